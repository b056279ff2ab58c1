"""Check merging: identical tokens lose nothing, what is untouched comes back bit by bit, sizes add up."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import effcompile as eff
from effcompile.models import zoo
from effcompile.ops.tokens import rows
from effcompile.ops.tokens.choice import match_pairs
from effcompile.passes.tokens.tome import ToMe
from tests.passes.tokens.test_drop import compiled, padding_of, tokens_of, tower


@torch.no_grad()
@pytest.mark.parametrize("stable", [True, False])
def test_rows_merge_and_come_back(stable):
    torch.manual_seed(0)
    x, keys = torch.randn(3, 17, 8).double(), torch.randn(3, 2, 17, 4).double()
    held = torch.zeros(3, 17, dtype=torch.bool)
    held[:, 0] = held[:, 5] = True
    index, source, into = match_pairs(keys, held, 4, stable)
    assert index.shape == (3, 13)
    assert (index.diff(dim=1) > 0).all()
    assert not (source == 0).any()
    assert not (index.gather(1, into) == 5).any()
    assert torch.equal(torch.cat([index, source], 1).sort(1).values, torch.arange(17).expand(3, -1))
    sizes = torch.ones(3, 17).double()
    merged = rows.merge_sizes(sizes, index, source, into)
    assert torch.equal(rows.merge_sizes(sizes, index, source, into, matrix=True), merged)
    products = rows.merge(x, sizes, merged, index, source, into, matrix=True)
    torch.testing.assert_close(products, rows.merge(x, sizes, merged, index, source, into), rtol=1e-14, atol=1e-14)
    assert torch.equal(merged.sum(1), sizes.sum(1))
    short = rows.merge(x, sizes, merged, index, source, into)
    back = rows.take(short, rows.homes(index, source, into, 17))
    untouched = torch.ones(3, 17, dtype=torch.bool).scatter(1, source, False)
    untouched.scatter_(1, index.gather(1, into), False)
    assert torch.equal(back[untouched], x[untouched])
    for b in range(3):
        for n in range(13):
            group = [int(index[b, n]), *(int(s) for s, i in zip(source[b], into[b], strict=True) if i == n)]
            torch.testing.assert_close(short[b, n], x[b, group].mean(0))


@torch.no_grad()
def test_identical_tokens_merge_without_loss():
    model = tower(read="all")
    model.place.zero_()
    ids = torch.tensor([[7, *([3] * 12), *range(20, 30)], [9, *([4] * 8), *([5] * 4), *range(40, 50)]])
    wanted = model(ids)
    found = compiled(model, "tome{ratio=0.2}")(ids)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    sizes = [site["q_len"] for graph in eff.report()["graphs"] for site in graph["sites"]]
    assert sizes == [23, *ToMe(ratio=0.2).counts(23, 4)[:-1]]


@torch.no_grad()
def test_ratio_0_is_the_graph_itself_and_the_first_token_stays():
    loaded = zoo.load("vit-tiny")
    args, _ = loaded.example_inputs(2)
    exact = torch.compile(loaded.model, backend="eff", options={"strict": True, "emit": "interpreter"})(*args)
    assert torch.equal(compiled(loaded.model, "tome{ratio=0}")(*args), exact)
    found = compiled(loaded.model, "tome{ratio=0.4}")(*args)
    assert F.cosine_similarity(found[:, 0], exact[:, 0]).min() > 0.95
    assert not torch.equal(found, exact)


def test_masks_and_positions_are_refused_by_name():
    ids = tokens_of()
    for fields, inputs, code in (
        ({"causal": True}, (ids,), "EFF-R106"),
        ({}, (ids, padding_of()), "EFF-R106"),
        ({"rope": True}, (ids,), "EFF-R107"),
    ):
        with torch.no_grad():
            report = eff.explain(tower(**fields), *inputs, options={"tokens": "tome{ratio=0.5}"}, target="cpu")
        codes = {d.refusal.code for d in report.plan.declined if d.family == "tokens"}
        assert codes == {code}


def test_training_is_refused():
    with pytest.raises(Exception, match="EFF-A301"):
        compiled(tower(), "tome{ratio=0.5}", require={"tokens": "all"})(tokens_of())


def test_counts_never_merge_more_than_half():
    for ratio in (0.0, 0.3, 0.75, 0.95):
        counts = ToMe(ratio=ratio).counts(257, 12)
        before = (257, *counts[:-1])
        assert all(0 <= a - b <= a // 2 - 1 for a, b in zip(before, counts, strict=True))
    assert ToMe(ratio=0.75).counts(257, 12)[-1] == 257 - int(0.75 * 257)


def test_steps_fall_rise_or_are_equal():
    equal, falling, rising = (ToMe(ratio=0.75, inflect=n).counts(257, 12) for n in (0, -1.0, 1.0))
    assert equal == tuple(257 - 192 * n // 12 for n in range(1, 13))
    steps = [257 - falling[0], *(a - b for a, b in itertools.pairwise(falling))]
    assert steps[0] == 32
    assert steps[-1] == 0
    assert all(a >= b - 1 for a, b in itertools.pairwise(steps))
    assert falling[-1] == rising[-1] == equal[-1] == 65
    assert sum(falling) < sum(equal) < sum(rising)
    for wrong in ("tome{inflect=2}", "tome{inflect=true}"):
        with pytest.raises(Exception, match="EFF-U004"):
            compiled(tower(), wrong)(tokens_of())
