"""Check merging around single sub-layers (ToMeSD): against loops, on the DiT of the zoo, and what stays by name."""

import pytest
import torch
import torch.nn.functional as F

import effcompile as eff
from effcompile.models import zoo
from effcompile.ops.tokens import rows
from effcompile.ops.tokens.choice import match_cells
from effcompile.passes.tokens.tomesd import ToMeSD
from tests.passes.tokens.test_drop import compiled, tokens_of, tower


def groups_of(x, height, width, merged):
    """Return the home of each token of one sequence `[N, C]`, by loops."""
    first = len(x) - height * width
    places = [(r, c, first + r * width + c) for r in range(height) for c in range(width)]
    corners = [n for r, c, n in places if r % 2 == 0 and c % 2 == 0]
    pairs = []
    for _, _, n in places:
        if n not in corners:
            near = F.cosine_similarity(x[n][None], x[corners])
            pairs.append((float(near.max()), n, corners[int(near.argmax())]))
    home = list(range(len(x)))
    for _, n, corner in sorted(pairs, reverse=True)[:merged]:
        home[n] = corner
    return home


def merged_run(model, ids, grid, merged):
    """Run a tower whose attention sees the mean of each group of tokens once, and gives all of them its result."""
    x = model.start(ids)
    for layer in model.layers:
        normed, out = layer.norm1(x), torch.zeros_like(x)
        for row in range(len(x)):
            home = torch.tensor(groups_of(normed[row], *grid, merged))
            kept = home.unique()
            short = torch.stack([normed[row, home == n].mean(0) for n in kept])[None]
            q, k, v = layer.heads_of(short, None)
            got = layer.joined(F.scaled_dot_product_attention(q, k, v))[0]
            out[row] = got[torch.searchsorted(kept, home)]
        x = x + out
        x = x + layer.mlp(layer.norm2(x))
    return model.end(x)


@torch.no_grad()
@pytest.mark.parametrize(("length", "grid"), [(26, (5, 5)), pytest.param(24, (4, 6), marks=pytest.mark.slow)])
def test_attention_runs_on_groups_and_all_else_on_tokens(length, grid):
    """An odd grid has cells that are cut; tokens in front of the grid stay."""
    model, ids = tower(), tokens_of(2, length)
    policy = ToMeSD(ratio=0.5, grid=grid)
    found = compiled(model, policy.spelled, require={"tokens": "all"})(ids)
    merged = length - policy.counts(length, 1)[0]
    assert merged == grid[0] * grid[1] // 2
    torch.testing.assert_close(found, merged_run(model, ids, grid, merged), rtol=1e-9, atol=1e-9)
    sites = [site for graph in eff.report()["graphs"] for site in graph["sites"]]
    assert [site["q_len"] for site in sites] == [length - merged] * 4
    assert [site["kv_len"] for site in sites] == [length - merged] * 4


@torch.no_grad()
@pytest.mark.parametrize("stable", [True, False])
def test_untouched_tokens_come_back_bit_by_bit(stable):
    x = torch.randn(3, 37, 8, generator=torch.Generator().manual_seed(0))
    index, source, into = match_cells(x, (6, 6), 20, stable)
    assert torch.equal(torch.cat([index, source], 1).sort(1).values, torch.arange(37).expand(3, -1))
    assert (index[:, 0] == 0).all()
    ones = torch.ones(3, 37)
    sizes = rows.merge_sizes(ones, index, source, into)
    assert torch.equal(sizes.sum(1), ones.sum(1))
    back = rows.take(rows.merge(x, ones, sizes, index, source, into), rows.homes(index, source, into, 37))
    untouched = torch.ones(3, 37, dtype=torch.bool).scatter(1, source, False)
    untouched.scatter_(1, index.gather(1, into), False)
    assert torch.equal(back[untouched], x[untouched])
    assert int(untouched.sum()) > 0
    for row in range(3):
        homes = torch.tensor(groups_of(x[row], 6, 6, 20))
        for n in range(37):
            torch.testing.assert_close(back[row, n], x[row, homes == homes[n]].mean(0))


@torch.no_grad()
@pytest.mark.slow
def test_a_diffusion_transformer_runs_with_it():
    """Its blocks shift, scale and gate by a condition; nothing but the sub-layers of attention changes."""
    loaded = zoo.load("dit-tiny")
    args, kwargs = loaded.example_inputs(2)
    model = loaded.model.double()
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    kwargs = {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}
    exact = model(*args, **kwargs)
    nothing = compiled(model, "tomesd{ratio=0}")(*args, **kwargs)
    torch.testing.assert_close(nothing, exact, rtol=1e-9, atol=1e-9)
    found = compiled(model, "tomesd{ratio=0.5}", require={"tokens": "all"})(*args, **kwargs)
    assert found.shape == exact.shape
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.5


@torch.no_grad()
@pytest.mark.slow
def test_a_plan_replays():
    model, ids = tower(), tokens_of(2)
    report = eff.explain(model, ids, options={"tokens": "tomesd{grid=[4,6]}"}, target="cpu")
    chosen = [c.policy for c in report.plan.choices if c.family == "tokens"]
    assert chosen == ["tomesd{grid=[4, 6],left=12}"] * 4
    torch._dynamo.reset()
    replay = torch.compile(model, backend=eff.backend(plan=report.plan, strict=True, emit="interpreter"))
    assert torch.equal(replay(ids), compiled(model, "tomesd{grid=[4,6]}")(ids))


@torch.no_grad()
def test_what_stays_stays_by_name():
    for fields, options, code in (
        ({"causal": True}, "tomesd", "EFF-R106"),
        ({"rope": True}, "tomesd", "EFF-R107"),
        ({}, "tomesd{least=100}", "EFF-R109"),
    ):
        report = eff.explain(tower(**fields), tokens_of(), options={"tokens": options}, target="cpu")
        assert {d.refusal.code for d in report.plan.declined if d.family == "tokens"} == {code}
    for text, code in (
        ("tomesd{grid=[5,6]}", "EFF-R115"),
        ("tomesd{grid=[5]}", "EFF-U004"),
        ("tomesd{ratio=1}", "EFF-U004"),
        ("tomesd{pinned=[0]}", "EFF-U004"),
    ):
        with pytest.raises(Exception, match=code):
            compiled(tower(), text)(tokens_of())
