"""Check that dropping tokens is hiding them: equal to masks over all tokens, at their positions, and nothing else changes."""

import pytest
import torch

import effcompile as eff
from effcompile.passes.tokens.fastv import FastV
from effcompile.passes.tokens.pyramid_drop import PyramidDrop
from effcompile.passes.tokens.spatten import SpAtten
from tests.support.tokens import Tower, masked_run

LENGTH, DEPTH = 24, 4


def compiled(model, tokens, **options):
    torch._dynamo.reset()
    return torch.compile(
        model, backend="eff", options={"tokens": tokens, "strict": True, "emit": "interpreter", **options}
    )


def tower(**fields):
    torch.manual_seed(0)
    return Tower(depth=DEPTH, **fields).double().eval()


def tokens_of(batch=3, length=LENGTH):
    return torch.randint(0, 60, (batch, length), generator=torch.Generator().manual_seed(1))


def padding_of(batch=3, length=LENGTH):
    lengths = torch.tensor([length, length - 9, length - 3])[:batch]
    return (torch.arange(length)[None] < lengths[:, None]).long()


def summed(number, probs, state):
    state["mass"] = state.get("mass", 0) + probs.sum(2).mean(1)
    return state["mass"]


def last(number, probs, state, real=None):
    rows = torch.full((probs.shape[0],), LENGTH - 1) if real is None else real.long().cumsum(-1).argmax(-1)
    return probs[torch.arange(len(rows)), :, rows].mean(1)


SLOW = pytest.mark.slow
FORMS = [
    pytest.param({"rope": True, "causal": True}, True, id="rope-causal-padded"),
    pytest.param({"rope": True, "causal": True}, False, id="rope-causal", marks=SLOW),
    pytest.param({"read": "first"}, False, id="first"),
    pytest.param({"read": "first"}, True, id="first-padded", marks=SLOW),
    pytest.param({"post": True}, True, id="post-padded"),
    pytest.param({"post": True}, False, id="post", marks=SLOW),
]


@torch.no_grad()
@pytest.mark.parametrize(("fields", "padded"), FORMS)
def test_dropping_equals_masking(fields, padded):
    model, ids = tower(**fields), tokens_of()
    padding = padding_of() if padded else None
    cases = [(SpAtten(keep=0.6), summed)]
    if fields.get("causal"):
        cases += [(PyramidDrop(), last), (FastV(ratio=0.5), last)]
    for policy, rank in cases:
        lefts = policy.counts(LENGTH, DEPTH)
        assert lefts[-1] < LENGTH - 6

        def ranked(number, probs, state, rank=rank):
            return rank(number, probs, state) if rank is summed else rank(number, probs, state, padding)

        wanted = masked_run(model, ids, lefts, ranked, padding)
        found = compiled(model, policy.spelled)(ids, *([] if padding is None else [padding]))
        if padding is not None and fields.get("read") is None:
            found, wanted = (torch.where(padding[..., None].bool(), x, 0) for x in (found, wanted))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        sizes = [site["q_len"] for graph in eff.report()["graphs"] for site in graph["sites"]]
        assert sizes == [LENGTH, *lefts[:-1]]


@torch.no_grad()
def test_nothing_dropped_changes_nothing():
    model, ids = tower(causal=True, rope=True), tokens_of()
    plain = torch.compile(model, backend="eff", options={"strict": True, "emit": "interpreter"})(ids)
    for text in ("spatten{keep=1.0}", "fastv{ratio=0}", "pyramid-drop{keep=[1.0]}"):
        assert torch.equal(compiled(model, text)(ids), plain)


@torch.no_grad()
def test_batches_are_sequences_apart():
    model, ids, order = tower(read="last", causal=True), tokens_of(), torch.tensor([2, 0, 1])
    fast = compiled(model, "spatten{keep=0.6}")
    torch.testing.assert_close(fast(ids)[order], fast(ids[order]), rtol=1e-12, atol=1e-12)


def test_sets_are_nested_and_work_falls_with_the_ratio():
    for text in (SpAtten, lambda keep: FastV(ratio=1 - keep)):
        rows = [text(keep=keep).counts(100, 12) for keep in (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)]
        assert all(list(row) == sorted(row, reverse=True) for row in rows)
        totals = [sum(row) for row in rows]
        assert totals == sorted(totals, reverse=True)
        assert len(set(totals)) == len(totals)


@torch.no_grad()
def test_pinned_ranges_stay():
    model, ids = tower(causal=True), tokens_of(2)
    policy = FastV(ratio=0.9, layer=1, pinned=((0, 8), -1))
    assert policy.counts(LENGTH, DEPTH)[-1] == 9 + 1
    full = model(ids)
    for place in (3, 20):
        other = ids.clone()
        other[:, place] = (other[:, place] + 1) % 60
        fast = compiled(model, policy.spelled)
        moved = (fast(ids)[:, -1] - fast(other)[:, -1]).abs().amax()
        assert moved > 1e-6 if place == 3 else True
    assert full.shape == fast(ids).shape


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("spatten{keep=0}", "EFF-U004"),
        ("tome{ratio=1}", "EFF-U004"),
        ("tome{ratio=-0.1}", "EFF-U004"),
        ("fastv{ratio=1.5}", "EFF-U004"),
        ("pyramid-drop{keep=[0.2,0.5]}", "EFF-U004"),
        ("spatten{pinned=[24]}", "EFF-R110"),
        ("spatten{pinned=[-25]}", "EFF-R110"),
        ("spatten{pinned=[[20,25]]}", "EFF-R110"),
        ("spatten{pinned=[1.5]}", "EFF-U004"),
        ("fastv{ratio=0.99,pinned=[]}", "EFF-R111"),
        ("spaten", "EFF-U014"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, code):
    with pytest.raises(Exception, match=code), torch.no_grad():
        compiled(tower(causal=True), text)(tokens_of())


@torch.no_grad()
def test_plan_names_every_site_and_replays():
    model, ids = tower(causal=True, rope=True), tokens_of()
    report = eff.explain(model, ids, options={"tokens": "spatten{keep=0.6}"}, target="cpu")
    plan = report.plan
    chosen = {c.site: c.policy for c in plan.choices if c.family == "tokens"}
    kept = {d.site: d.refusal.code for d in plan.declined if d.family == "tokens"}
    assert kept == {"layers.0": "EFF-R109"}
    assert set(chosen) == {"layers.1", "layers.2", "layers.3"}
    assert all("left=" in text for text in chosen.values())
    assert "EFF-R109" in str(report)
    assert "tokens" in str(report)
    torch._dynamo.reset()
    replay = torch.compile(model, backend=eff.backend(plan=plan, strict=True, emit="interpreter"))
    torch.testing.assert_close(replay(ids), compiled(model, "spatten{keep=0.6}")(ids), rtol=0, atol=0)


def test_require_counts_shortened_sites():
    class Windows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tower()

        def forward(self, ids):
            x = self.inner.start(ids)
            for layer in self.inner.layers:
                x = layer(x.reshape(-1, 4, 32)).reshape(3, LENGTH, 32).roll(2, 1)
            return x

    model = Windows().double().eval()
    with pytest.raises(Exception, match=r"EFF-R104[\s\S]*EFF-R104"), torch.no_grad():
        compiled(model, "spatten{keep=0.6}", require={"tokens": "all"})(tokens_of())
    with torch.no_grad():
        report = eff.explain(model, tokens_of(), options={"tokens": "spatten{keep=0.6}"}, target="cpu")
    codes = {d.site: d.refusal.code for d in report.plan.declined if d.family == "tokens"}
    assert set(codes.values()) == {"EFF-R104"}
    assert len(codes) == DEPTH


@torch.no_grad()
def test_batch_may_be_a_symbol():
    model = tower(causal=True, rope=True)
    fast, one = compiled(model, "spatten{keep=0.6}"), tokens_of(3)
    torch._dynamo.mark_dynamic(one, 0)
    fast(one)
    for batch in (2, 5):
        ids = torch.randint(0, 60, (batch, LENGTH))
        lefts = SpAtten(keep=0.6).counts(LENGTH, DEPTH)
        torch.testing.assert_close(fast(ids), masked_run(model, ids, lefts, summed), rtol=1e-9, atol=1e-9)
    assert len(eff.report()["graphs"]) == 1
