"""Compare both ways to run `eff::attention_blocks_v1`, C++ and torch operations, with attention in float64 over its pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile.core.expr import BOOL, INT, TRUE, Expr, apply, const, load
from effcompile.core.expr_eval import evaluate, to_json
from effcompile.core.mask import CAUSAL, B, H, K, Q
from effcompile.ops import attention_blocks as blocks
from effcompile.ops import native
from effcompile.ops.attention import grid
from tests.support.check import near

WAYS = {"compiled": blocks.compiled, "gathered": blocks.gathered}


def qkv(
    batch: int,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    seed: int = 0,
) -> list[Tensor]:
    """Return q, k, v with transposed strides, as projections give them."""
    draw = torch.Generator().manual_seed(seed)
    shapes = zip(
        (heads[0], heads[1], heads[1]), (lengths[0], lengths[1], lengths[1]), (widths[0], widths[0], widths[1])
    )
    return [torch.randn(batch, n, h, d, generator=draw).to(dtype).transpose(1, 2) for h, n, d in shapes]


def pairs(
    chosen: Tensor, keep: Expr, extents: tuple[int, int, int, int], loads: list[Tensor], block: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return (kept by map and predicate, kept by the predicate) `[B, H, Q, K]`."""
    batch, heads, rows, keys = extents
    wide = chosen.expand(batch, -1, -1, -1).repeat_interleave(heads // chosen.shape[1], 1)
    wide = wide.repeat_interleave(block[0], 2)[:, :, :rows].repeat_interleave(block[1], 3)[..., :keys]
    kept = evaluate(keep, grid(*extents, torch.device("cpu")), loads, []).expand(extents)
    return kept & wide, kept


def reference(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return output and LSE; a row without keys gives 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * scale
    scores = scores.float() if scores.dtype != torch.float64 else scores
    scores = scores.masked_fill(~kept, -math.inf)
    probs = scores.softmax(-1).nan_to_num().to(v.dtype)
    return probs @ v.repeat_interleave(group, 1), scores.logsumexp(-1)


PREDICATES = {
    "full": TRUE,
    "causal": CAUSAL.keep,
    "offset": apply("le", K, apply("add", Q, const(5))),
    "window": apply("and", CAUSAL.keep, apply("le", apply("sub", Q, const(20)), K)),
    "padding": apply("and", CAUSAL.keep, load(0, (B, K), BOOL)),
    "padded rows": apply("and", load(0, (B, K), BOOL), load(0, (B, Q), BOOL)),
    "documents": apply("and", CAUSAL.keep, apply("eq", load(1, (B, Q), INT), load(1, (B, K), INT))),
    "positions": apply("le", K, load(2, (Q,), INT)),
    "heads": apply("or", CAUSAL.keep, apply("eq", H, const(1))),
    "dilated": apply("eq", apply("mod", apply("sub", Q, K), const(3)), const(0)),
}
predicates = st.sampled_from(sorted(PREDICATES))


@settings(max_examples=40, deadline=None)
@given(
    predicates,
    st.sampled_from(["compiled", "gathered"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
    st.sampled_from([(64, 64), (16, 16), (40, 72), (80, 33), (1, 1)]),
    st.sampled_from([(16, 16), (64, 64), (128, 128), (64, 32), (32, 128)]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 999),
)
def test_both_ways_give_the_chosen_pairs(
    named: str,
    way: str,
    dtype: torch.dtype,
    lengths: tuple[int, int],
    widths: tuple[int, int],
    block: tuple[int, int],
    map_heads: int,
    seed: int,
) -> None:
    keep = PREDICATES[named]
    rows, keys = lengths
    draw = torch.Generator().manual_seed(seed)
    q, k, v = qkv(2, (4, 2), lengths, widths, dtype, seed)
    most = max(rows, keys)
    loads = [
        torch.rand(2, most, generator=draw) < 0.6,
        torch.randint(0, 3, (2, most), generator=draw).sort(-1).values,
        torch.randint(0, keys, (most,), generator=draw).sort().values,
    ]
    shape = (draw.initial_seed() % 2 + 1, map_heads, -(-rows // block[0]), -(-keys // block[1]))
    chosen = torch.rand(shape, generator=draw) < 0.5
    kept, _ = pairs(chosen, keep, (2, 4, rows, keys), loads, block)
    scale = 1 / math.sqrt(widths[0])
    out, lse = WAYS[way](q, k, v, chosen, loads, [], to_json(keep), scale, *block)
    expected, _ = reference(q, k, v, kept, scale)
    exact, exact_lse = reference(q.double(), k.double(), v.double(), kept, scale)
    near([out], [expected], [exact], way)
    assert torch.equal(lse == -math.inf, ~kept.any(-1))
    # Products of bfloat16 are exact in float32, so the LSE is float's own in every dtype.
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rule", ["zero", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_map_empties_a_row(rule: str, dtype: torch.dtype) -> None:
    """A row for which the map leaves nothing reads all that the predicate keeps; one that it empties follows its rule."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = qkv(2, (4, 2), (70, 70), (16, 16), dtype)
    real = torch.rand(2, 70, generator=draw) < 0.3
    real[:, :9] = False
    keep = apply("and", CAUSAL.keep, load(0, (B, K), BOOL))
    chosen = torch.rand(2, 4, 5, 5, generator=draw) < 0.3
    kept, allowed = pairs(chosen, keep, (2, 4, 70, 70), [real], (16, 16))
    assert (allowed.any(-1) & ~kept.any(-1)).any(), "the example has no row to revive"
    kept = torch.where(kept.any(-1, keepdim=True), kept, allowed)
    out = blocks.attention_blocks(q, k, v, chosen, [real], [], to_json(keep), rule, 0.25, 16, 16)
    exact, _ = reference(q.double(), k.double(), v.double(), kept, 0.25)
    if rule == "uniform":
        mean = v.double().mean(2, keepdim=True).repeat_interleave(2, 1)
        exact = torch.where(allowed.any(-1, keepdim=True), exact, mean)
    assert not out.isnan().any()
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_keep_everything_is_dense() -> None:
    """T0: with every block chosen the error against float64 is at most twice that of SDPA itself."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = qkv(1, (9, 3), (500, 500), (64, 64), dtype)
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        exact = torch.nn.functional.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
        )
        chosen = torch.ones(1, 1, 4, 4, dtype=torch.bool)
        out = blocks.attention_blocks(q, k, v, chosen, [], [], to_json(CAUSAL.keep), "never", 0.125, 128, 128)
        assert (out - exact).abs().max() <= 2 * (dense - exact).abs().max()


def test_disjoint_maps_merge_by_their_lse() -> None:
    """T1: outputs over two halves of the keys, weighted by exp(LSE), are the output over all of them."""
    q, k, v = qkv(2, (4, 2), (100, 130), (32, 32), torch.float32)
    half = torch.rand(2, 4, 7, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    keep = to_json(apply("le", K, apply("add", Q, const(30))))
    parts = [blocks.compiled(q, k, v, chosen, [], [], keep, 0.2, 16, 16) for chosen in (half, ~half)]
    whole, lse = blocks.compiled(q, k, v, torch.ones_like(half), [], [], keep, 0.2, 16, 16)
    total = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * (part - total).exp()[..., None] for out, part in parts)
    torch.testing.assert_close(total, lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)


def test_later_keys_and_threads_change_no_bit() -> None:
    """T4, and the same bits whatever the number of threads."""
    q, k, v = qkv(1, (4, 2), (300, 300), (64, 64), torch.float32)
    chosen = torch.rand(1, 4, 5, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    chosen |= torch.eye(5, dtype=torch.bool)
    arguments = (chosen, [], [], to_json(CAUSAL.keep), "never", 0.125, 64, 64)
    out = blocks.attention_blocks(q, k, v, *arguments)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 200:], v2[:, :, 200:] = 9.0, -9.0
    assert torch.equal(out[:, :, :200], blocks.attention_blocks(q, k2, v2, *arguments)[:, :, :200])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(out, blocks.attention_blocks(q, k, v, *arguments))
    finally:
        torch.set_num_threads(threads)


def test_layouts_and_edges() -> None:
    """Strides of any kind, no query at all, values of another width, one head of the map for all."""
    q, k, v = qkv(1, (2, 2), (40, 40), (24, 8), torch.float32)
    chosen = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    arguments = (chosen, [], [], to_json(CAUSAL.keep), "never", 0.2, 16, 16)
    expected = blocks.attention_blocks(q.contiguous(), k.contiguous(), v.contiguous(), *arguments)
    wide = torch.randn(1, 2, 40, 48)
    wide[..., ::2] = q
    assert torch.equal(blocks.attention_blocks(wide[..., ::2], k, v, *arguments), expected)
    none = blocks.attention_blocks(q[:, :, :0], k, v, chosen[:, :, :0], *arguments[1:])
    assert none.shape == (1, 2, 0, 8)


def test_cpp_kernels_are_built_here() -> None:
    """A mistake in the C++ source must not hide behind the composition of torch operations."""
    assert native.library() is not None


def test_op_is_registered_with_a_fake() -> None:
    from torch.library import opcheck

    from effcompile import ops

    ops.register()
    q, k, v = qkv(1, (2, 1), (20, 20), (16, 16), torch.float32)
    arguments = (q, k, v, torch.ones(1, 1, 2, 2, dtype=torch.bool), [], [], to_json(CAUSAL.keep), "never", 0.25, 16, 16)
    opcheck(torch.ops.eff.attention_blocks_v1.default, arguments, test_utils=("test_schema", "test_faketensor"))
