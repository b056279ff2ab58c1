"""Check what all policies over run-time maps promise: dense at the keep-everything end, masks kept, no look ahead, no new graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from effcompile.core.errors import EffError
from effcompile.core.mask import CAUSAL, Mask
from effcompile.core.policy import Estimate, Policy, read_policy
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.passes.attention.block_topk import BlockTopk
from effcompile.passes.attention.dynamic import DynamicPattern
from effcompile.passes.attention.pooled_cdf import PooledCdf
from effcompile.passes.attention.quest import Quest
from effcompile.passes.attention.vertical_slash import VerticalSlash
from effcompile.passes.attention.xattention import XAttention
from effcompile.targets import devices
from tests.support.check import CPU, all_catalog, check_policy, check_refusal, fresh, policy_graphs, raise_attention

PREFILL = (
    BlockTopk(density=0.4, block=16, dense_layers=0),
    XAttention(threshold=0.5, stride=4, block=16),
    XAttention(threshold=0.3, stride=4, block=16, tail=20),
    PooledCdf(cdf=0.5, similarity=0.0, block=32),
    VerticalSlash(coverage=0.5, probe=8, block=16, column=16),
)
EVERYTHING = (
    BlockTopk(density=1.0, block=16, dense_layers=0),
    XAttention(threshold=1.0, stride=4, block=16),
    PooledCdf(cdf=1.0, block=32),
    PooledCdf(cdf=0.5, similarity=1.0, block=32),
    VerticalSlash(coverage=1.0, block=16, column=16),
)
DECODE = (BlockTopk(budget=32, page=8, dense_layers=0), Quest(budget=32, page=8, dense_layers=0))
SITE = AttentionSite(
    "layers.3.attn", "attention", "graph", "model.py:1", batch=1, heads=4, kv_heads=2, head_dim=64, value_dim=64, q_len=4096,
    kv_len=4096, mask=CAUSAL, scale=0.125,
)  # fmt: skip


def named(policy: Policy) -> str:
    return policy.spelled


def qkv(batch: int, heads: tuple[int, int], lengths: tuple[int, int], seed: int = 0, width: int = 16) -> list[Tensor]:
    """Return q, k, v whose scores are far from even, so that a map that drops the wrong blocks shows."""
    draw = torch.Generator().manual_seed(seed)
    shapes = zip((heads[0], heads[1], heads[1]), (lengths[0], lengths[1], lengths[1]))
    return [2 * torch.randn(batch, n, h, width, generator=draw).transpose(1, 2) for h, n in shapes]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with one query whose token gave the last key, as in decode."""
    keys = torch.cat([k[:, :, :-1], k[:, :, -1:] + 0 * q[:, : k.shape[1]]], 2)
    return F.scaled_dot_product_attention(q, keys, v, enable_gqa=True)


def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~kept, -math.inf)
    return torch.where(kept.any(-1, keepdim=True), scores.softmax(-1), 0.0) @ v


class Maps(fx.Interpreter):
    """Run a graph and keep the maps of its sparse attention, as pairs `[B, H, Q, K]`."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: list[Tensor] = []

    def call_function(self, target: object, args: tuple, kwargs: dict) -> object:  # type: ignore[override, type-arg]
        if target is torch.ops.eff.attention_blocks_v1.default:
            q, k, chosen, blocks = args[0], args[1], args[3], args[-2:]
            wide = chosen.repeat_interleave(blocks[0], 2)[:, :, : q.shape[2]]
            self.found.append(wide.repeat_interleave(blocks[1], 3)[..., : k.shape[2]])
        return super().call_function(target, args, kwargs)  # type: ignore[arg-type]


def chosen_pairs(policy: Policy, function: Callable[..., Tensor], args: list[Tensor]) -> Tensor:
    maps = Maps(policy_graphs(raise_attention(function, fresh(args)), policy)["cpu-blocks"])
    maps.run(*fresh(args))
    (found,) = maps.found
    return found


# --- T0 to T3: everything is dense; what is kept is the map within the mask, for groups of heads and batches ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", EVERYTHING, ids=named)
def test_the_keep_everything_end_is_dense(policy: DynamicPattern, dtype: torch.dtype) -> None:
    args = [x.to(dtype) for x in qkv(1, (4, 2), (150, 150))]
    check_policy(policy, causal, args, causal)


@pytest.mark.parametrize("policy", DECODE, ids=named)
def test_a_budget_of_all_tokens_is_dense(policy: DynamicPattern) -> None:
    """A cache that the budget covers is refused where its length is known, and dense where it is not."""
    args, whole = qkv(2, (4, 2), (1, 40)), replace(policy, budget=40)  # type: ignore[call-arg]
    check_refusal(whole, step, args, "EFF-A502")
    for graph in policy_graphs(raise_attention(step, qkv(2, (4, 2), (1, 50)), symbolic=True), whole).values():
        torch.testing.assert_close(graph(*args), step(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", PREFILL, ids=named)
def test_what_is_kept_is_the_map_within_the_mask(policy: DynamicPattern, dtype: torch.dtype) -> None:
    args = [x.to(dtype) for x in qkv(2, (4, 2), (150, 150))]
    chosen = chosen_pairs(policy, causal, args)
    order = torch.ones(150, 150, dtype=torch.bool).tril()
    kept = chosen & order
    assert 0.1 < float(kept.sum() / (order.sum() * 8)) < 0.9, "the example keeps nearly all or nothing"
    check_policy(policy, causal, args, lambda q, k, v: attend(q, k, v, kept))
    for number in range(2):  # a batch is its sequences
        alone = chosen_pairs(policy, causal, [x[number : number + 1] for x in args])
        assert torch.equal(alone[0], chosen[number])


# --- masks: padding of any kind, windows, chunks of a cache ---


STYLES = ("left", "right", "holes", "one empty")


def real_keys(style: str, length: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    places, cut = torch.arange(length), torch.randint(1, length, (2, 1), generator=draw)
    return {
        "left": places >= cut,
        "right": places < cut,
        "holes": torch.rand(2, length, generator=draw) < 0.5,
        "one empty": (places < cut) & torch.tensor([[True], [False]]),
    }[style]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("policy", PREFILL, ids=named)
def test_padded_batches(policy: DynamicPattern, style: str) -> None:
    """No dropped key comes back, no row that has a key loses all of them, no row is NaN."""
    length = 100
    real = real_keys(style, length, 5)

    def dense(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        kept = (torch.arange(length)[None] <= torch.arange(length)[:, None])[None, None] & real[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept, enable_gqa=True)

    args = [*qkv(2, (4, 2), (length, length)), real]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & real[:, None, None]
    kept = chosen_pairs(policy, dense, args) & allowed
    kept = torch.where(kept.any(-1, keepdim=True), kept, allowed)
    check_policy(policy, dense, args, lambda q, k, v, _: attend(q, k, v, kept))


@settings(max_examples=24, deadline=None)
@given(st.sampled_from(PREFILL), st.integers(2, 70), st.integers(0, 60), st.booleans(), st.integers(0, 99))
def test_chunks_of_any_length(policy: DynamicPattern, rows: int, more: int, window: bool, seed: int) -> None:
    """T5, T6: fewer queries than keys, lengths that no block divides; the model's own window is kept."""
    keys = rows + more

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at, of = torch.arange(rows)[:, None] + (keys - rows), torch.arange(keys)[None]
        kept = of <= at
        if window:
            kept = kept & (of > at - 40)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept, enable_gqa=True)

    args = qkv(1, (4, 2), (rows, keys), seed)
    if keys <= policy.least(replace(SITE, q_len=rows, kv_len=keys)):
        check_refusal(policy, dense, args, "EFF-A502")
        return
    at, of = torch.arange(rows)[:, None] + more, torch.arange(keys)[None]
    allowed = (of <= at) & ((of > at - 40) | torch.tensor(not window))
    kept = chosen_pairs(policy, dense, args) & allowed
    assert kept.gather(-1, at.expand(1, 4, -1, -1)).all(), "a query loses its own key"
    check_policy(policy, dense, args, lambda q, k, v: attend(q, k, v, kept))


# --- T4: later keys ---


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(PREFILL[:4]), st.integers(1, 129), st.sampled_from([0, 7]), st.integers(0, 99))
def test_later_keys_change_nothing(policy: DynamicPattern, cut: int, more: int, seed: int) -> None:
    """A change of key j leaves every row before j as it was, bit for bit, whatever block both are in."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at, of = torch.arange(130)[:, None] + more, torch.arange(130 + more)[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=of <= at, enable_gqa=True)

    args = qkv(1, (4, 2), (130, 130 + more), seed)
    changed = fresh(args)
    changed[1][:, :, cut + more :] *= -3.0
    changed[2][:, :, cut + more :] = 7.0
    graph = policy_graphs(raise_attention(dense, args), policy)["cpu-blocks"]
    assert torch.equal(graph(*args)[:, :, :cut], graph(*changed)[:, :, :cut])


# --- decode ---


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("policy", DECODE, ids=named)
def test_decode_reads_its_budget(policy: DynamicPattern, static: bool) -> None:
    """With a cache that grows, and with one of fixed size in which later slots hold garbage."""

    def decode(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        if not static:
            return step(q, k, v)
        kept = (torch.arange(k.shape[2])[None] <= at[:, None])[None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept, enable_gqa=True)

    args = [*qkv(2, (4, 2), (1, 100)), torch.tensor([69])]
    args[1][:, :, 70:] = 50.0 if static else args[1][:, :, 70:]
    allowed = torch.arange(100) <= (69 if static else 99)
    kept = chosen_pairs(policy, decode, args) & allowed
    assert (kept.sum(-1) <= 32).all()
    assert (kept.sum(-1) >= 32 - 8).all()
    own = 69 if static else 99
    assert kept[..., [0, own]].all()
    check_policy(policy, decode, args, lambda q, k, v, _: attend(q, k, v, kept))


def test_quest_keeps_the_page_of_a_needle() -> None:
    """One key that a query looks for outweighs its page; a bound finds it, the page's mean does not."""
    q, k, v = qkv(1, (2, 2), (1, 128), width=16)
    k = 0.1 * k
    k[:, :, 40:48] = -q[:, :, :1]
    k[:, :, 43] = 3 * q[:, :, 0]
    bound, mean = (chosen_pairs(policy, step, [q, k, v]) for policy in reversed(DECODE))
    assert bound[..., 43].all()
    assert not mean[..., 43].any()


# --- T8: lengths and steps ---


@pytest.mark.parametrize("policy", PREFILL, ids=named)
def test_a_symbolic_length_needs_no_new_graph(policy: DynamicPattern) -> None:
    raised = raise_attention(causal, qkv(1, (4, 2), (100, 100)), symbolic=True)
    for name, graph in policy_graphs(raised, policy).items():
        for length in (2, 15, 16, 100, 130):
            args = qkv(1, (4, 2), (length, length), seed=length)
            kept = torch.ones(length, length, dtype=torch.bool).tril()
            if length > 32:
                kept = kept & chosen_pairs(policy, causal, args)
            torch.testing.assert_close(
                graph(*args), attend(*args, kept.expand(1, 4, -1, -1)), msg=lambda text, n=name: f"{n}: {text}"
            )


# --- refusals ---


def opaque(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.sort(-1).values > 0, enable_gqa=True)


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    bias = (at[None] - at[:, None]).to(q.dtype).masked_fill(at[None] > at[:, None], -math.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


@pytest.mark.parametrize("policy", PREFILL, ids=named)
def test_refusals(policy: DynamicPattern) -> None:
    args = qkv(1, (4, 2), (100, 100))
    check_refusal(policy, opaque, [*args, torch.randn(100, 100)], "EFF-A103")
    check_refusal(policy, biased, args, "EFF-A207")
    check_refusal(policy, causal, qkv(1, (4, 2), (30, 30)), "EFF-A502")
    check_refusal(policy, full, qkv(1, (4, 2), (30, 90)), "EFF-A504")
    catalog = all_catalog()
    changes = {
        "EFF-A201": replace(SITE, softcap=30.0),
        "EFF-A202": replace(SITE, sinks=True),
        "EFF-A204": replace(SITE, mask=Mask(CAUSAL.keep, empty_row="nan")),
        "EFF-A507": replace(SITE, heads=3),
        "EFF-A501": replace(SITE, id="layers.0.attn"),
    }
    for code, site in changes.items():
        asked = replace(policy, dense_layers=1) if code == "EFF-A501" else policy
        answer = asked.propose(site, CPU, catalog)
        assert isinstance(answer, Refusal), code
        assert answer.code == code, answer
    answer = policy.propose(SITE, Target.parse("t4", devices()), catalog)
    assert isinstance(answer, Refusal)
    assert answer.code == "EFF-A505"
    assert "sm_75" in answer.reason
    assert isinstance(policy.propose(SITE, Target.parse("sm_90", devices()), catalog), Estimate)


def test_phases() -> None:
    for policy in (*PREFILL, *DECODE):
        for rows, phase in ((1, "decode"), (4096, "prefill")):
            answer = policy.propose(replace(SITE, q_len=rows), CPU, all_catalog())
            assert isinstance(answer, Estimate) == (policy.phase in (phase, "both")), answer
            if isinstance(answer, Refusal):
                assert answer.code == "EFF-A508"
    assert getattr(VerticalSlash().propose(replace(SITE, mask=Mask()), CPU, all_catalog()), "code", "") == "EFF-A504"


def test_the_papers_own_dense_layers() -> None:
    layers = {policy: policy().dense_layers for policy in (BlockTopk, Quest, XAttention, PooledCdf, VerticalSlash)}
    assert layers == {BlockTopk: 1, Quest: 2, XAttention: 0, PooledCdf: 0, VerticalSlash: 0}
    for policy in (BlockTopk(dense_layers=0), Quest(dense_layers=0)):
        assert isinstance(policy.propose(replace(SITE, id="layers.0.attn", q_len=1), CPU, all_catalog()), Estimate)


@pytest.mark.parametrize("policy", [*PREFILL, *DECODE], ids=named)
def test_fewer_blocks_cost_less(policy: DynamicPattern) -> None:
    site = replace(SITE, q_len=1) if policy.phase == "decode" else SITE
    more = {
        BlockTopk: {"density": 1.0}, XAttention: {"threshold": 1.0}, PooledCdf: {"cdf": 1.0},
        VerticalSlash: {"coverage": 1.0}, Quest: {"budget": 2048},
    }[type(policy)]  # fmt: skip
    few, all_of_it = (p.propose(site, CPU, all_catalog()) for p in (policy, replace(policy, **more)))
    assert isinstance(few, Estimate)
    assert isinstance(all_of_it, Estimate)
    assert few.seconds < all_of_it.seconds
    assert few.density < all_of_it.density


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("block-topk{density=0}", "above 0 and at most 1"),
        ("block-topk{density=1.5}", "above 0 and at most 1"),
        ("block-topk{block=100}", "multiple of 16"),
        ("block-topk{block=0}", "at least 16"),
        ("block-topk{budget=1000,page=16}", "multiple of 16"),
        ("quest{budget=100,page=16}", "multiple of 16"),
        ("quest{page=0}", "at least 1"),
        ("xattention{threshold=0}", "above 0 and at most 1"),
        ("xattention{stride=24}", "multiple of 24"),
        ("pooled-cdf{cdf=2}", "above 0 and at most 1"),
        ("pooled-cdf{similarity=-1}", "between 0 and 1"),
        ("pooled-cdf{block=48}", "multiple of 32"),
        ("vertical-slash{coverage=0}", "above 0 and at most 1"),
        ("vertical-slash{probe=0}", "at least 1"),
        ("vertical-slash{column=8}", "at least 16"),
        ("vertical-slash{dense_layers=-1}", "at least 0"),
    ],
)
def test_bad_values_name_what_is_wrong(text: str, words: str) -> None:
    from effcompile.compiler import all_policies

    with pytest.raises(EffError, match=words) as caught:
        read_policy("attention", text, all_policies())
    assert caught.value.code == "EFF-U004"


def test_a_spelling_reads_back() -> None:
    from effcompile.compiler import all_policies

    for policy in (*PREFILL, *EVERYTHING, *DECODE):
        assert read_policy("attention", policy.spelled, all_policies()) == policy
        assert read_policy("attention", policy.settled().spelled, all_policies()) == policy.settled()
