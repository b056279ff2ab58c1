"""Compute attention whose query-key products are 8-bit integers (SageAttention, arXiv 2410.02367).

q and k come rounded (`quantize.py`), one scale a block of rows. Products are taken in int8 with 32-bit sums, a whole tile is
scaled by one number, and probabilities and values stay in v's type. The LSE is that of the true scores: the product with the
mean key, which the rounding of the keys took away, is added to it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effcompile.codegen.triton import launch, quantize
from effcompile.codegen.triton.kernel import Config, Form, Kernel, pieces
from effcompile.codegen.triton.parts import kept, load_queries, load_rows, logsumexp, online_softmax, store_rows
from effcompile.ops.int8_attention import K_BLOCK, Q_BLOCK


@triton.jit
def int8_span(
    acc0, acc1, high, total, q0, q1, q_scale, k, k_scales, v, lo, hi, low, top, first, last,
    V_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Take the tiles of keys that begin at lo, lo + BLOCK_N, ... < hi; `q_scale` is the query block's, times scale * log2(e)."""
    places = tl.arange(0, BLOCK_N)
    for start in tl.range(lo, hi, BLOCK_N):
        keys = start + places
        valid = (keys >= first) & (keys < last)
        tile = k + tl.cast(start, tl.int64) * D
        products = tl.dot(
            q0, tl.trans(load_rows(tile, D, places, valid, tl.arange(0, D0), D, 0, MASKED)), out_dtype=tl.int32
        )
        if D1 > 0:
            more = load_rows(tile, D, places, valid, tl.arange(0, D1), D, D0, MASKED)
            products = tl.dot(q1, tl.trans(more), products, out_dtype=tl.int32)
        scores = products.to(tl.float32)
        if MASKED:
            scores = tl.where(kept(low, top, keys, valid, HAS_LEFT, HAS_RIGHT), scores, float("-inf"))
        factor = q_scale * tl.load(k_scales + start // K_BLOCK)
        weights, high, total, shrink = online_softmax(scores, factor, high, total)
        v_tile = v + tl.cast(start, tl.int64) * V_ROW
        values = load_rows(v_tile, V_ROW, places, valid, tl.arange(0, V0), DV, 0, MASKED)
        weights = weights.to(values.dtype)
        acc0 = tl.dot(weights, values, acc0 * shrink[:, None])
        if V1 > 0:
            more = load_rows(v_tile, V_ROW, places, valid, tl.arange(0, V1), DV, V0, MASKED)
            acc1 = tl.dot(weights, more, acc1 * shrink[:, None])
    return acc0, acc1, high, total


@triton.jit
def int8_attention(
    q, k, v, out, lse, q_scales, k_scales, shifts, begin, end,
    v_batch, v_head, heads, kv_heads, rows, keys, q_blocks, k_blocks, left, right, offset, scale,
    V_ROW: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_RANGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Run one tile of query rows of one (batch row, head); the walk over the keys is that of `flash.flash`."""
    tiles = tl.cdiv(rows, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    owner = tl.program_id(0) // tiles
    batch = owner // heads
    kv_owner = batch * kv_heads + (owner % heads) // (heads // kv_heads)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < rows
    low_row, high_row = tile * BLOCK_M, tl.minimum(tile * BLOCK_M + BLOCK_M, rows) - 1
    first, last = 0, keys
    if HAS_RANGE:
        first = tl.maximum(tl.load(begin + batch), 0)
        last = tl.minimum(tl.load(end + batch), keys)
    lo, hi, lo_full, hi_full = first, last, first, last
    if HAS_LEFT:
        lo = tl.maximum(lo, low_row + offset - left)
        lo_full = tl.maximum(lo_full, high_row + offset - left)
    if HAS_RIGHT:
        hi = tl.minimum(hi, high_row + offset + right + 1)
        hi_full = tl.minimum(hi_full, low_row + offset + right + 1)
    lo = (lo // BLOCK_N) * BLOCK_N
    lo_full = tl.cdiv(lo_full, BLOCK_N) * BLOCK_N
    hi_full = (tl.maximum(hi_full, 0) // BLOCK_N) * BLOCK_N

    where = owner.to(tl.int64) * rows + row
    q0 = load_queries(q, where * D, live, D, 0, D0)
    q1 = q0
    if D1 > 0:
        q1 = load_queries(q, where * D, live, D, D0, D1)
    q_scale = tl.load(q_scales + owner.to(tl.int64) * q_blocks + (tile * BLOCK_M) // Q_BLOCK) * (
        scale * 1.4426950408889634
    )
    k = k + kv_owner.to(tl.int64) * keys * D
    k_scales = k_scales + kv_owner.to(tl.int64) * k_blocks
    v = v + (batch.to(tl.int64) * v_batch + (kv_owner % kv_heads).to(tl.int64) * v_head) * STEP

    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
    acc1 = total
    if V1 > 0:
        acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    low, top = row + (offset - left), row + (offset + right)
    if HAS_LEFT or HAS_RANGE:
        acc0, acc1, high, total = int8_span(
            acc0, acc1, high, total, q0, q1, q_scale, k, k_scales, v, lo, tl.minimum(lo_full, hi), low, top, first, last,
            V_ROW, D, DV, D0, D1, V0, V1, HAS_LEFT, HAS_RIGHT, K_BLOCK, BLOCK_N, True,
        )  # fmt: skip
    acc0, acc1, high, total = int8_span(
        acc0, acc1, high, total, q0, q1, q_scale, k, k_scales, v, lo_full, hi_full, low, top, first, last,
        V_ROW, D, DV, D0, D1, V0, V1, HAS_LEFT, HAS_RIGHT, K_BLOCK, BLOCK_N, False,
    )  # fmt: skip
    acc0, acc1, high, total = int8_span(
        acc0, acc1, high, total, q0, q1, q_scale, k, k_scales, v, tl.maximum(lo_full, hi_full), hi, low, top, first, last,
        V_ROW, D, DV, D0, D1, V0, V1, HAS_LEFT, HAS_RIGHT, K_BLOCK, BLOCK_N, True,
    )  # fmt: skip

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    shift = tl.load(shifts + where, mask=live, other=0.0)
    tl.store(lse + where, logsumexp(high, total) + shift, mask=live)
    store_rows(out, where, live, acc0 / divisor, DV, 0)
    if V1 > 0:
        store_rows(out, where, live, acc1 / divisor, DV, V0)


def form(
    dtype: str,
    width: int,
    value_width: int,
    *,
    row: int | None = None,
    step: int = 8,
    left: bool = False,
    right: bool = False,
    ranged: bool = False,
) -> Form:
    """Return the form of the attention; q and k are int8, `dtype` is that of v."""
    types = (
        ("q k", "*i8"),
        ("v out", f"*{dtype}"),
        ("lse q_scales k_scales shifts", "*fp32"),
        ("begin end", "*i32"),
        ("v_batch v_head heads kv_heads rows keys q_blocks k_blocks left right offset", "i32"),
        ("scale", "fp32"),
    )
    (d0, d1), (v0, v1) = pieces(width, 32), pieces(value_width)
    sizes = {
        "V_ROW": row or value_width,
        "STEP": step,
        "D": width,
        "DV": value_width,
        "D0": d0,
        "D1": d1,
        "V0": v0,
        "V1": v1,
    }
    sizes |= {"Q_BLOCK": Q_BLOCK, "K_BLOCK": K_BLOCK}
    flags = {"HAS_LEFT": left, "HAS_RIGHT": right, "HAS_RANGE": ranged}
    told = [word for word, said in zip(("left", "right", "range"), flags.values()) if said]
    name = "-".join((dtype, f"d{width}" if width == value_width else f"d{width}.{value_width}", *told))
    return Form(name, launch.typed(types), launch.fixed(sizes, flags), ("q", "k", "v", "out", "lse"))


def forms(arch: str) -> tuple[Form, ...]:
    """Return the forms of the attention that are compiled in tests."""
    return (
        form("fp16", 128, 128, right=True),
        form("fp16", 64, 64),
        form("bf16", 72, 72, left=True, right=True, ranged=True),
    )


def configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the configs of the attention, the default first; tiles divide the blocks that share a scale (128 x 64)."""
    if arch == launch.SMALL:
        return (Config((("BLOCK_M", 16), ("BLOCK_N", 16)), 1, 1),)
    at = dict(shape.constants)
    width = max(int(at["D0"] or 0) + int(at["D1"] or 0), int(at["V0"] or 0) + int(at["V1"] or 0))
    stages = 1 if arch.startswith("gfx") else 3 if arch in ("sm_90", "sm_100") and width <= 128 else 2
    if width > 192:
        tiles: tuple[tuple[int, int, int], ...] = ((64, 32, 8),)
    elif width > 64 and arch == "sm_120":
        tiles = ((128, 32, 8),)  # wider tiles spill there
    else:
        tiles = ((128, 64, 8), (64, 64, 4))
    return tuple(Config((("BLOCK_M", m), ("BLOCK_N", n)), warps, stages) for m, n, warps in tiles)


KERNELS = (Kernel("int8_attention", int8_attention, forms, configs), *quantize.KERNELS)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    left: int,
    right: int,
    offset: int,
    scale: float,
    *,
    traced: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run `eff::int8_attention_v1` (effcompile/ops/int8_attention.py says what it means) with the kernels.

    Raises:
        EffError: EFF-K101 for the chip, EFF-K103 for dtypes, EFF-K104 for shapes.
    """
    launch.check(q, k, v)
    q, scale = launch.positive(q, scale)
    q, k, v = (launch.dense_rows(x) for x in (q, k, v))
    batch, heads, rows, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    ranged = begin is not None or end is not None
    out = v.new_empty((batch, heads, rows, v.shape[3]))
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    edges = launch.ranges(begin, end, batch, keys, q)
    mean = quantize.key_mean(k, edges, ranged, traced)
    small_k, k_scales, _ = quantize.rounded(k, mean, K_BLOCK, edges, ranged, True, 0.0, traced)
    small_q, q_scales, shifts = quantize.rounded(q, mean, Q_BLOCK, edges, False, False, scale, traced)
    strides, step = launch.strides(v)
    arch = launch.architecture_of(q)
    flags = {"left": left >= 0, "right": right >= 0, "ranged": ranged}
    shape = form(launch.word(v), width, v.shape[3], row=int(v.stride(2)), step=step, **flags)
    config = configs(shape, arch)[0]
    runtime = (
        *(small_q, small_k, v, out, lse, q_scales, k_scales, shifts, *edges, *strides, heads, kv_heads, rows, keys),
        *(q_scales.shape[2], k_scales.shape[2], left, right, offset, scale),
    )
    tiles = launch.cdiv(rows, config.constants["BLOCK_M"])
    launch.run(KERNELS[0], (tiles * batch * heads,), runtime, shape, config, traced)
    return out, lse
