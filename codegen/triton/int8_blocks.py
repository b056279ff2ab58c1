"""Compute attention over lists of key blocks with 8-bit products: the lists of `block_sparse.py`, the tiles of `int8.py`.

Keys come centered and rounded (`quantize.py`), one scale for 64 of them, so that a tile of keys lies in one of those blocks and in
one block of the list. Partial blocks check a range of keys for each row and a byte for each key, full blocks neither.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effcompile.codegen.triton import launch, quantize
from effcompile.codegen.triton.kernel import Config, Form, Kernel, pieces
from effcompile.codegen.triton.parts import kept, load_queries, load_rows, logsumexp, online_softmax, store_rows
from effcompile.core.expr import TRUE
from effcompile.ops import attention_blocks as op
from effcompile.ops.block_sparse import lists
from effcompile.ops.int8_attention import K_BLOCK, Q_BLOCK, quantized
from effcompile.ops.int8_blocks import centered, int8_blocks
from effcompile.ops.row_limits import split_limits, values


@triton.jit
def int8_listed(
    acc0, acc1, high, total, q0, q1, q_scale, k, k_scales, v, count, entries, low, top, keys, key_mask,
    V_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, KV_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDED: tl.constexpr,
    BANDED: tl.constexpr, HAS_KEYS: tl.constexpr,
):  # fmt: skip
    """Take the blocks of one list, `count` entries long; BANDED ones are under the element mask, BOUNDED ones may pass the end."""
    per_block: tl.constexpr = KV_BLOCK // BLOCK_N
    places = tl.arange(0, BLOCK_N)
    for step in tl.range(0, count * per_block):
        start = tl.load(entries + step // per_block) * KV_BLOCK + (step % per_block) * BLOCK_N
        own = start + places
        valid = own < keys
        tile = k + tl.cast(start, tl.int64) * D
        products = tl.dot(
            q0, tl.trans(load_rows(tile, D, places, valid, tl.arange(0, D0), D, 0, BOUNDED)), out_dtype=tl.int32
        )
        if D1 > 0:
            more = load_rows(tile, D, places, valid, tl.arange(0, D1), D, D0, BOUNDED)
            products = tl.dot(q1, tl.trans(more), products, out_dtype=tl.int32)
        scores = products.to(tl.float32)
        if BANDED:
            if HAS_KEYS:
                valid = valid & (tl.load(key_mask + own, mask=valid, other=0) != 0)
            scores = tl.where(kept(low, top, own, valid, True, True), scores, float("-inf"))
        elif BOUNDED:
            scores = tl.where(valid[None, :], scores, float("-inf"))
        # A tile past the end has no scale; any positive one leaves its -inf alone.
        factor = q_scale * tl.load(k_scales + start // K_BLOCK, mask=start < keys, other=1.0)
        weights, high, total, shrink = online_softmax(scores, factor, high, total)
        v_tile = v + tl.cast(start, tl.int64) * V_ROW
        values = load_rows(v_tile, V_ROW, places, valid, tl.arange(0, V0), DV, 0, BOUNDED)
        weights = weights.to(values.dtype)
        acc0 = tl.dot(weights, values, acc0 * shrink[:, None])
        if V1 > 0:
            more = load_rows(v_tile, V_ROW, places, valid, tl.arange(0, V1), DV, V0, BOUNDED)
            acc1 = tl.dot(weights, more, acc1 * shrink[:, None])
    return acc0, acc1, high, total


@triton.jit
def int8_blocks_kernel(
    q, k, v, out, lse, q_scales, k_scales, counts, indices, full_counts, full_indices, row_first, row_last, key_mask,
    v_batch, v_head, heads, kv_heads, rows, keys, q_scale_blocks, k_scale_blocks, list_batches, list_heads, list_rows, width,
    full_width, limit_batches, key_batches, scale,
    V_ROW: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, MAP_ROWS: tl.constexpr,
    KV_BLOCK: tl.constexpr, EVEN: tl.constexpr, HAS_KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Run one tile of query rows, all of one block of the map and of one scale, of one (batch row, head)."""
    tiles = tl.cdiv(rows, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    owner = tl.program_id(0) // tiles
    batch = owner // heads
    head = owner % heads
    kv_owner = batch * kv_heads + head // (heads // kv_heads)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < rows
    where = owner.to(tl.int64) * rows + row
    q0 = load_queries(q, where * D, live, D, 0, D0)
    q1 = q0
    if D1 > 0:
        q1 = load_queries(q, where * D, live, D, D0, D1)
    q_scale = tl.load(q_scales + owner.to(tl.int64) * q_scale_blocks + (tile * BLOCK_M) // Q_BLOCK) * (
        scale * 1.4426950408889634
    )
    k = k + kv_owner.to(tl.int64) * keys * D
    k_scales = k_scales + kv_owner.to(tl.int64) * k_scale_blocks
    v = v + (batch.to(tl.int64) * v_batch + (kv_owner % kv_heads).to(tl.int64) * v_head) * STEP

    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
    acc1 = total
    if V1 > 0:
        acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    limits = (batch % limit_batches).to(tl.int64) * rows + row
    low = tl.load(row_first + limits, mask=live, other=0)
    top = tl.load(row_last + limits, mask=live, other=-1)
    if HAS_KEYS:
        key_mask = key_mask + (batch % key_batches).to(tl.int64) * keys
    line = (batch % list_batches) * list_heads + head // (heads // list_heads)
    line = line.to(tl.int64) * list_rows + (tile * BLOCK_M) // MAP_ROWS
    acc0, acc1, high, total = int8_listed(
        acc0, acc1, high, total, q0, q1, q_scale, k, k_scales, v, tl.load(counts + line), indices + line * width, low, top, keys,
        key_mask, V_ROW, D, DV, D0, D1, V0, V1, KV_BLOCK, K_BLOCK, BLOCK_N, True, True, HAS_KEYS,
    )  # fmt: skip
    acc0, acc1, high, total = int8_listed(
        acc0, acc1, high, total, q0, q1, q_scale, k, k_scales, v, tl.load(full_counts + line), full_indices + line * full_width,
        low, top, keys, key_mask, V_ROW, D, DV, D0, D1, V0, V1, KV_BLOCK, K_BLOCK, BLOCK_N, not EVEN, False, False,
    )  # fmt: skip

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(lse + where, logsumexp(high, total), mask=live)
    store_rows(out, where, live, acc0 / divisor, DV, 0)
    if V1 > 0:
        store_rows(out, where, live, acc1 / divisor, DV, V0)


def form(
    dtype: str,
    width: int,
    value_width: int,
    *,
    blocks: tuple[int, int] = (128, 128),
    even: bool = True,
    keyed: bool = False,
    row: int | None = None,
    step: int = 8,
) -> Form:
    """Return the form; q and k are int8, `dtype` is that of v, `blocks` are those of the map, which divide the keys if `even`."""
    types = (
        ("q k", "*i8"),
        ("v out", f"*{dtype}"),
        ("lse q_scales k_scales", "*fp32"),
        ("counts indices full_counts full_indices row_first row_last", "*i32"),
        ("key_mask", "*u8"),
        (
            "v_batch v_head heads kv_heads rows keys q_scale_blocks k_scale_blocks list_batches list_heads list_rows width",
            "i32",
        ),
        ("full_width limit_batches key_batches", "i32"),
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
    sizes |= {"Q_BLOCK": Q_BLOCK, "K_BLOCK": K_BLOCK, "MAP_ROWS": blocks[0], "KV_BLOCK": blocks[1]}
    flags = {"EVEN": even, "HAS_KEYS": keyed}
    shape = f"d{width}" if width == value_width else f"d{width}.{value_width}"
    name = "-".join(
        (dtype, shape, f"b{blocks[0]}x{blocks[1]}", *(("keys",) if keyed else ()), *(() if even else ("odd",)))
    )
    return Form(name, launch.typed(types), launch.fixed(sizes, flags), ("q", "k", "v", "out", "lse"))


def forms(arch: str) -> tuple[Form, ...]:
    """Return the forms that are compiled in tests."""
    return (
        form("bf16", 128, 128),
        form("bf16", 64, 64, blocks=(64, 64)),
        form("fp16", 128, 128, blocks=(128, 64), even=False, keyed=True),
    )


def configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the configs, the default first; tiles divide the blocks of the map and those that share a scale (128 x 64)."""
    at = dict(shape.constants)
    map_rows, kv_block = int(at["MAP_ROWS"] or 0), int(at["KV_BLOCK"] or 0)
    width = max(int(at["D0"] or 0) + int(at["D1"] or 0), int(at["V0"] or 0) + int(at["V1"] or 0))
    stages = 1 if arch.startswith("gfx") else 3 if arch in ("sm_90", "sm_100") and width <= 128 else 2
    if arch == launch.SMALL:
        tiles: tuple[tuple[int, int, int], ...] = ((16, 16, 1),)
    elif width > 192:
        tiles = ((64, 32, 8),)
    elif width > 64 and arch not in ("sm_90", "sm_100"):
        tiles = ((128, 32, 8),)
    else:
        tiles = ((128, 64, 8), (64, 64, 4))
    found = {}
    for m, n, warps in tiles:
        own = launch.divisor(map_rows, launch.divisor(Q_BLOCK, m)), launch.divisor(kv_block, launch.divisor(K_BLOCK, n))
        warps = 8 if arch == "sm_100" else warps  # four warps spill there
        found[own] = Config((("BLOCK_M", own[0]), ("BLOCK_N", own[1])), warps, 1 if arch == launch.SMALL else stages)
    return tuple(found.values())


KERNELS = (Kernel("int8_blocks", int8_blocks_kernel, forms, configs),)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    keep: str,
    empty_row: str,
    scale: float,
    q_block: int,
    k_block: int,
) -> Tensor:
    """Run `eff::int8_blocks_v1` (effcompile/ops/int8_blocks.py says what it means) with the kernels.

    A predicate that tells apart heads or single pairs, and blocks that are no multiple of 16, run on the op's own body.
    """
    parts = split_limits(keep)
    if parts.rest != TRUE or q_block % 16 or k_block % 16 or max(q.shape[3], v.shape[3]) > launch.WIDEST:
        return int8_blocks(q, k, v, chosen, loads, sizes, keep, empty_row, scale, q_block, k_block)
    launch.check(q, k, v)
    q, scale = launch.positive(q, scale)
    q, k, v = (launch.dense_rows(x) for x in (q, k, v))
    batch, heads, rows, width = q.shape
    extents = (batch, heads, rows, k.shape[2])
    limits = values(parts, extents, loads, sizes)
    first, last, real = (None if x is None else x.to(q.device) for x in (limits.first, limits.last, limits.keys))
    out = v.new_empty((batch, heads, rows, v.shape[3]))
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or k.shape[2] == 0:
        return int8_blocks(q, k, v, chosen, loads, sizes, keep, empty_row, scale, q_block, k_block)
    small_k, k_scales, small_q, q_scales = _rounded(q, k, real)
    every, some = op.bounds(keep, extents, (q_block, k_block), loads, sizes, q.device)
    picked = op.within(chosen, some, heads)
    many = max(picked.shape[1], every.shape[1])
    picked, every = (x.repeat_interleave(many // x.shape[1], 1) for x in (picked, every))
    (counts, indices), (full_counts, full_indices) = lists(picked & ~every), lists(picked & every)
    low = torch.full((1, rows), 0, dtype=torch.int32, device=q.device) if first is None else first
    top = torch.full((1, rows), k.shape[2], dtype=torch.int32, device=q.device) if last is None else last
    low, top = (x.contiguous() for x in torch.broadcast_tensors(low, top))
    mask = counts if real is None else real.to(torch.uint8).contiguous()
    strides, step = launch.strides(v)
    even = k.shape[2] % k_block == 0
    told = {"blocks": (q_block, k_block), "even": even, "keyed": real is not None}
    shape = form(launch.word(v), width, v.shape[3], row=int(v.stride(2)), step=step, **told)  # type: ignore[arg-type]
    config = configs(shape, launch.architecture_of(q))[0]
    runtime = (
        *(
            small_q,
            small_k,
            v,
            out,
            lse,
            q_scales,
            k_scales,
            counts,
            indices,
            full_counts,
            full_indices,
            low,
            top,
            mask,
        ),
        *(*strides, heads, k.shape[1], rows, k.shape[2], q_scales.shape[2], k_scales.shape[2]),
        *(counts.shape[0], counts.shape[1], counts.shape[2], indices.shape[3], full_indices.shape[3]),
        *(low.shape[0], mask.shape[0], scale),
    )
    tiles = launch.cdiv(rows, config.constants["BLOCK_M"])
    launch.run(KERNELS[0], (tiles * batch * heads,), runtime, shape, config, False)
    dead = torch.isneginf(lse)
    if bool(dead.any()):
        queries, q_rows = quantized(q, Q_BLOCK)
        keys, k_rows = quantized(centered(k, real), K_BLOCK)
        wide = (queries * q_rows, keys * k_rows, v.to(queries.dtype))
        found = torch.zeros_like(wide[0][..., :1]).expand(*out.shape).clone()
        op.revive(found, dead, *wide, loads, sizes, keep, empty_row, scale)
        out = torch.where(dead[..., None], found.to(out.dtype), out)
    return out


def _rounded(q: Tensor, k: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (int8 keys, their scales, int8 queries, their scales), contiguous; keys lose their mean over the real ones."""
    edges = launch.ranges(None, None, q.shape[0], k.shape[2], q)
    wide = centered(k, real)
    none = torch.zeros((k.shape[0], k.shape[1], k.shape[3]), dtype=torch.float32, device=k.device)
    small_k, k_scales, _ = quantize.rounded(wide, none, K_BLOCK, edges, False, True, 0.0, False)
    small_q, q_scales, _ = quantize.rounded(q, none, Q_BLOCK, edges, False, True, 0.0, False)
    return small_k, k_scales, small_q, q_scales
