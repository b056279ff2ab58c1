"""Compare `sliding-window` and `sink-window` with masks that are written down pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.core.expr import BOOL, INT, TRUE, apply, const, load
from effcompile.core.expr_eval import evaluate
from effcompile.core.intervals import block_bounds
from effcompile.core.mask import B, K, Mask, Q
from effcompile.core.policy import Estimate, Policy, read_policy
from effcompile.core.site import AttentionSite, Refusal
from effcompile.ops.attention import grid
from effcompile.passes.attention.sink_window import SinkWindow
from effcompile.passes.attention.sliding_window import SlidingWindow
from tests.support.check import CPU, all_catalog, check_policy, check_refusal, fresh, policy_graphs, raise_attention

LEAST = torch.finfo(torch.float32).min


def qkv(batch: int, heads: tuple[int, int], lengths: tuple[int, int], seed: int = 0, width: int = 16) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = zip((heads[0], heads[1], heads[1]), (lengths[0], lengths[1], lengths[1]))
    return [torch.randn(batch, n, h, width, generator=draw).transpose(1, 2) for h, n in shapes]


def pattern(own: Tensor, keys: int, policy: Policy, causal: bool) -> Tensor:
    """Return the pairs of a pattern, `[Q, K]`, where query i's own key is own[i]."""
    window, sinks = getattr(policy, "window", 0), getattr(policy, "sinks", 0)
    distance = own[:, None] - torch.arange(keys)[None]
    near = distance < window if causal else distance.abs() < window
    return near | (torch.arange(keys)[None] < sinks)


def narrowed(kept: Tensor, own: Tensor, policy: Policy, causal: bool = True) -> Tensor:
    """Return kept pairs `[B, 1, Q, K]` with the pattern, except rows of which own key and first key are masked."""
    pairs = kept & pattern(own, kept.shape[-1], policy, causal)
    mine = kept.gather(-1, own.clamp(0, kept.shape[-1] - 1).expand(*kept.shape[:-2], -1)[..., None])
    if getattr(policy, "sinks", 0):
        mine = mine | kept[..., :1]
    return torch.where(mine, pairs, kept)


def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, empty: str = "zero") -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~kept, -math.inf)
    probs = scores.softmax(-1)
    rest = torch.full_like(probs, 1 / k.shape[2] if empty == "uniform" else 0.0)
    return torch.where(kept.any(-1, keepdim=True), probs, rest) @ v


policies = st.one_of(
    st.builds(SlidingWindow, window=st.integers(1, 9)),
    st.builds(SinkWindow, window=st.integers(1, 9), sinks=st.integers(1, 3)),
)
ORDERS = ("offset", "positions", "both sides")
STYLES = ("none", "left", "right", "holes", "one empty")


def real_keys(style: str, length: int, seed: int) -> Tensor:
    """Return kept keys `[2, K]`."""
    draw = torch.Generator().manual_seed(seed)
    places, cut = torch.arange(length), torch.randint(1, length, (2, 1), generator=draw)
    return {
        "none": torch.ones(2, length, dtype=torch.bool),
        "left": places >= cut,
        "right": places < cut,
        "holes": torch.rand(2, length, generator=draw) < 0.4,
        "one empty": (places < cut) & torch.tensor([[True], [False]]),
    }[style]


@settings(max_examples=150, deadline=None)
@given(
    policies,
    st.integers(1, 12),
    st.integers(0, 20),
    st.sampled_from(STYLES),
    st.sampled_from(ORDERS),
    st.integers(0, 99),
)
def test_narrowed_masks(policy: Policy, rows: int, more: int, style: str, order: str, seed: int) -> None:
    """The predicate is the pattern within the mask, and a row is empty only where the mask empties it."""
    keys = rows if order == "both sides" else rows + more
    real = real_keys(style, max(keys, 2), seed)[:, :keys]
    draw = torch.Generator().manual_seed(seed)
    own = torch.arange(rows) + (keys - rows)
    keep = apply("le", K, apply("add", Q, const(keys - rows)))
    if order == "positions":  # as in a static cache; some of its slots are beyond every position
        own = torch.randint(0, keys, (rows,), generator=draw).sort().values
        keep = apply("le", K, load(1, (Q,), INT))
    if order == "both sides":
        own, keep = torch.arange(rows), TRUE
    keep = apply("and", keep, load(0, (B, K), BOOL))
    before = Mask(keep, empty_row="zero")
    site = AttentionSite("layers.0", "attention", "forward", "", batch=2, q_len=rows, kv_len=keys, mask=before)
    after = policy.narrowed(site).mask
    assert isinstance(after, Mask)
    axes, loads = grid(2, 1, rows, keys, torch.device("cpu")), [real, own]
    was, found = (evaluate(mask.keep, axes, loads, []).expand(2, 1, rows, keys) for mask in (before, after))
    assert torch.equal(found, narrowed(was, own, policy, causal=order != "both sides"))
    assert torch.equal(found.any(-1), was.any(-1))
    every, some = block_bounds(after.keep, (2, 1, rows, keys), (4, 4), loads, [], torch.device("cpu"))
    whole, part = (
        F.pad(found, (0, -keys % 4, 0, -rows % 4), value=v).unflatten(2, (-1, 4)).unflatten(4, (-1, 4))
        for v in (True, False)
    )
    assert not (every & ~whole.all(5).all(3)).any()
    assert not (~some & part.any(5).any(3)).any()


@pytest.mark.parametrize("policy", [SlidingWindow(window=5), SinkWindow(window=4, sinks=2)], ids=lambda p: p.spelled)
@pytest.mark.parametrize(
    ("style", "additive"), [("none", False), ("left", True), ("right", False), ("holes", True), ("one empty", False)]
)
def test_padded_batches(policy: Policy, style: str, additive: bool) -> None:
    length = 21
    real, places = real_keys(style, length, 3), torch.arange(length)

    def dense(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        if style == "none":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        kept = (torch.arange(length)[None] <= torch.arange(length)[:, None])[None, None] & real[:, None, None]
        mask = torch.where(kept, 0.0, LEAST).to(q.dtype) if additive else kept
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & real[:, None, None]
    kept = narrowed(causal, places, policy)
    args = [*qkv(2, (4, 2), (length, length)), real]
    check_policy(policy, dense, args, lambda q, k, v, _: attend(q, k, v, kept, "uniform" if additive else "zero"))


@pytest.mark.parametrize("positions", [False, True])
def test_chunk_of_a_cache(positions: bool) -> None:
    """Fewer queries than keys: the last query's own key is the last one, or each stands where `positions` says."""
    rows, keys, policy = 7, 30, SinkWindow(window=4, sinks=2)
    own = torch.arange(rows) + (9 if positions else keys - rows)

    def dense(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        place = at if positions else torch.arange(rows) + (keys - rows)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=(torch.arange(keys)[None] <= place[:, None])[None, None]
        )

    kept = narrowed((torch.arange(keys)[None] <= own[:, None])[None, None], own, policy)
    args = [*qkv(1, (2, 2), (rows, keys)), own]
    check_policy(policy, dense, args, lambda q, k, v, _: attend(q, k, v, kept))


@pytest.mark.parametrize("policy", [SlidingWindow(window=3), SinkWindow(window=3, sinks=2)], ids=lambda p: p.spelled)
def test_without_causal_order_both_sides_are_kept(policy: Policy) -> None:
    kept = narrowed(torch.ones(1, 1, 20, 20, dtype=torch.bool), torch.arange(20), policy, causal=False)
    args = qkv(1, (2, 2), (20, 20))
    check_policy(policy, F.scaled_dot_product_attention, args, lambda q, k, v: attend(q, k, v, kept))


def test_one_new_query_reads_the_end_of_its_cache() -> None:
    """A decode step without a mask: keys derive from the token and from a cache, so this is no cross attention."""
    policy = SinkWindow(window=3, sinks=1)

    def step(token: Tensor, past: Tensor) -> Tensor:
        keys = torch.cat([past, token], 2)
        return F.scaled_dot_product_attention(token, keys, keys)

    def oracle(token: Tensor, past: Tensor) -> Tensor:
        keys = torch.cat([past, token], 2)
        own = torch.tensor([keys.shape[2] - 1])
        return attend(token, keys, keys, narrowed(torch.ones(1, 1, 1, keys.shape[2], dtype=torch.bool), own, policy))

    token, past, _ = qkv(1, (2, 2), (1, 12))
    check_policy(policy, step, [token, past], oracle)
    raised = raise_attention(step, [token, past], symbolic=True)
    for name, graph in policy_graphs(raised, policy).items():
        for length in (4, 12, 30):
            _, other, _ = qkv(1, (2, 2), (1, length), seed=length)
            torch.testing.assert_close(
                graph(token, other), oracle(token, other), msg=lambda text, n=name: f"{n}: {text}"
            )


def test_a_symbolic_length_needs_no_new_graph() -> None:
    policy = SinkWindow(window=5, sinks=2)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    raised = raise_attention(dense, qkv(1, (2, 2), (20, 20)), symbolic=True)
    for name, graph in policy_graphs(raised, policy).items():
        for length in (3, 7, 20, 41):
            args = qkv(1, (2, 2), (length, length), seed=length)
            causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            expected = attend(*args, narrowed(causal, torch.arange(length), policy))
            torch.testing.assert_close(graph(*args), expected, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("cap", [False, True])
def test_score_functions_and_sinks_stay(cap: bool) -> None:
    """Softcap, ALiBi and sink logits are the kernels' business, so a window leaves them as they are."""
    policy, length = SlidingWindow(window=4), 24

    def chain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, kept: Tensor | None = None) -> Tensor:
        scores = q @ k.transpose(-1, -2) * 0.25
        if cap:
            scores = torch.tanh(scores / 5.0) * 5.0
        places = torch.arange(length)
        slopes = torch.arange(1, 3).to(q.dtype)[:, None, None] / 4
        scores = scores + (places[None] - places[:, None]) * slopes
        causal = places[None] <= places[:, None] if kept is None else kept
        scores = scores.masked_fill(~causal, -math.inf)
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        return scores.softmax(-1)[..., :-1] @ v

    def dense(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return chain(q, k, v, sinks)

    kept = narrowed(torch.ones(length, length, dtype=torch.bool).tril()[None, None], torch.arange(length), policy)
    args = [*qkv(1, (2, 2), (length, length)), torch.tensor([0.3, -0.2])]
    check_policy(policy, dense, args, lambda q, k, v, s: chain(q, k, v, s, kept))


def test_the_keep_everything_end_is_dense() -> None:
    """T0: a window as wide as the sequence is refused, since nothing would change; one key less is not."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    args = qkv(1, (2, 2), (16, 16))
    refusal = check_refusal(SlidingWindow(window=16), dense, args, "EFF-A502")
    assert "16 keys" in refusal.reason
    check_refusal(SinkWindow(window=12, sinks=4), dense, args, "EFF-A502")
    kept = torch.ones(16, 16, dtype=torch.bool).tril()[None, None]
    check_policy(
        SlidingWindow(window=15),
        dense,
        args,
        lambda q, k, v: attend(q, k, v, narrowed(kept, torch.arange(16), SlidingWindow(window=15))),
    )


def test_later_keys_change_nothing() -> None:
    """T4: a change of key j leaves every row before j as it was, bit for bit."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    args = qkv(1, (2, 2), (40, 40))
    changed = fresh(args)
    changed[1][:, :, 25:] = 7.0
    changed[2][:, :, 25:] = -3.0
    for graph in policy_graphs(raise_attention(dense, args), SinkWindow(window=6, sinks=2)).values():
        assert torch.equal(graph(*args)[:, :, :25], graph(*changed)[:, :, :25])


def cross(text: Tensor, latents: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(latents * 2 @ torch.eye(16), text @ torch.eye(16), text @ torch.eye(16))


def opaque(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.sort(-1).values > 0)


@pytest.mark.parametrize(
    ("function", "args", "code"),
    [
        (cross, lambda: [qkv(1, (2, 2), (20, 20))[0], qkv(1, (2, 2), (20, 20))[1]], "EFF-A504"),
        (cross, lambda: [qkv(1, (2, 2), (9, 20))[1], qkv(1, (2, 2), (9, 20))[0]], "EFF-A504"),
        (F.scaled_dot_product_attention, lambda: qkv(1, (2, 2), (5, 20)), "EFF-A504"),
        (opaque, lambda: [*qkv(1, (2, 2), (20, 20)), torch.randn(20, 20)], "EFF-A103"),
    ],
    ids=["cross, equal lengths", "cross", "unequal lengths", "opaque"],
)
def test_refusals(function: Callable[..., Tensor], args: Callable[[], list[Tensor]], code: str) -> None:
    check_refusal(SlidingWindow(window=3), function, args(), code)


def test_a_window_of_the_model_is_narrower_already() -> None:
    def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(32)
        kept = (places[None] <= places[:, None]) & (places[None] > places[:, None] - 6)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept)

    refusal = check_refusal(SlidingWindow(window=6), windowed, qkv(1, (2, 2), (32, 32)), "EFF-A502")
    assert "window" in refusal.reason
    places = torch.arange(32)
    kept = ((places[None] <= places[:, None]) & (places[None] > places[:, None] - 4))[None, None]
    check_policy(SlidingWindow(window=4), windowed, qkv(1, (2, 2), (32, 32)), lambda q, k, v: attend(q, k, v, kept))


def test_dense_layers() -> None:
    site = raise_attention(
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), qkv(1, (2, 2), (32, 32))[:1]
    ).sites[0]
    policy = SinkWindow(window=4, dense_layers=2)
    for layer, taken in ((0, False), (1, False), (2, True), (11, True)):
        answer = policy.propose(replace(site, id=f"model.layers.{layer}.self_attn"), CPU, all_catalog())
        assert isinstance(answer, Estimate) == taken, answer
        if isinstance(answer, Refusal):
            assert answer.code == "EFF-A501"
    assert policy.settled().spelled == "sink-window{window=4}"


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("sink-windw", "EFF-U014", "sink-window"),
        ("sink-window{windw=4}", "EFF-U003", "window"),
        ("sink-window{window=0}", "EFF-U004", "at least 1"),
        ("sink-window{window=4.5}", "EFF-U004", "whole number"),
        ("sink-window{window=wide}", "EFF-U004", "whole number"),
        ("sink-window{window=true}", "EFF-U004", "whole number"),
        ("sink-window{sinks=0}", "EFF-U004", "at least 1"),
        ("sliding-window{window=-1}", "EFF-U004", "at least 1"),
        ("sliding-window{dense_layers=-1}", "EFF-U004", "at least 0"),
        ("sliding-window{window}", "EFF-U003", "field=value"),
        ("", "EFF-U003", "cannot read"),
    ],
)
def test_bad_spellings_name_what_is_wrong(text: str, code: str, words: str) -> None:
    from effcompile.compiler import all_policies

    with pytest.raises(EffError, match=words) as caught:
        read_policy("attention", text, all_policies())
    assert caught.value.code == code


def test_a_spelling_reads_back() -> None:
    from effcompile.compiler import all_policies

    for policy in (SlidingWindow(), SinkWindow(window=7, sinks=2, dense_layers=3)):
        assert read_policy("attention", policy.spelled, all_policies()) == policy
