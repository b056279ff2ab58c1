"""Add up the attention that each key gets: a_j = sum_i exp(score_ij - LSE_i), from an LSE that is known.

A program owns a tile of keys and walks over the tiles of queries that see any of them: the sum is written once, so it does
not depend on the order in which programs run. It costs one query-key product, half of attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effcompile.codegen.triton import launch
from effcompile.codegen.triton.kernel import Config, Form, Kernel, pieces
from effcompile.codegen.triton.parts import capped, kept, load_queries, load_rows


@triton.jit
def column_sums(
    q, k, lse, out, begin, end, q_batch, q_head, k_batch, k_head, heads, kv_heads, rows, keys, left, right, offset, scale, softcap,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_RANGE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the sums of one tile of keys of one (batch row, query head)."""
    tiles = tl.cdiv(keys, BLOCK_N)
    tile = tl.program_id(0) % tiles
    owner = tl.program_id(0) // tiles
    batch = owner // heads
    head = owner % heads
    kv_head = head // (heads // kv_heads)
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    first, last = 0, keys
    if HAS_RANGE:
        first = tl.maximum(tl.load(begin + batch), 0)
        last = tl.minimum(tl.load(end + batch), keys)
    valid = (key >= first) & (key < last)
    # Rows [lo, hi) see some key of the tile.
    lo, hi = 0, rows
    if HAS_RIGHT:
        lo = tl.maximum(tile * BLOCK_N - right - offset, 0) // BLOCK_M * BLOCK_M
    if HAS_LEFT:
        hi = tl.minimum(rows, tile * BLOCK_N + BLOCK_N + left - offset)
    if HAS_RANGE:
        hi = tl.where((tile * BLOCK_N < last) & (tile * BLOCK_N + BLOCK_N > first), hi, 0)
    q = q + (batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head) * STEP
    k = k + (batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head) * STEP
    k_rows = key.to(tl.int64) * K_ROW
    k0 = tl.trans(load_queries(k, k_rows, valid, D, 0, D0))
    k1 = k0
    if D1 > 0:
        k1 = tl.trans(load_queries(k, k_rows, valid, D, D0, D1))
    sums = tl.zeros([BLOCK_N], tl.float32)
    places = tl.arange(0, BLOCK_M)
    for start in tl.range(lo, hi, BLOCK_M):
        row = start + places
        live = row < rows
        tile_q = q + tl.cast(start, tl.int64) * Q_ROW
        scores = tl.dot(
            load_rows(tile_q, Q_ROW, places, live, tl.arange(0, D0), D, 0, True), k0, input_precision=PRECISION
        )
        if D1 > 0:
            more = load_rows(tile_q, Q_ROW, places, live, tl.arange(0, D1), D, D0, True)
            scores = tl.dot(more, k1, scores, input_precision=PRECISION)
        factor = 1.4426950408889634
        if HAS_SOFTCAP:
            scores = capped(scores, scale, softcap)
        else:
            factor = scale * 1.4426950408889634
        logs = tl.load(lse + owner.to(tl.int64) * rows + row, mask=live, other=float("-inf"))
        some = logs != float("-inf")
        at = row + offset
        keep = kept(at - left, at + right, key, valid, HAS_LEFT, HAS_RIGHT) & some[:, None]
        weights = tl.exp2(scores * factor - tl.where(some, logs, 0.0)[:, None] * 1.4426950408889634)
        sums += tl.sum(tl.where(keep, weights, 0.0), 0)
    tl.store(out + owner.to(tl.int64) * keys + key, sums, mask=key < keys)


def form(
    dtype: str,
    arch: str,
    width: int,
    *,
    strides: tuple[int, ...] | None = None,
    step: int = 8,
    left: bool = False,
    right: bool = False,
    ranged: bool = False,
    capped: bool = False,
) -> Form:
    """Return the form; the arguments are as in `flash.form`."""
    types = (
        ("q k", f"*{dtype}"),
        ("lse out", "*fp32"),
        ("begin end", "*i32"),
        ("q_batch q_head k_batch k_head heads kv_heads rows keys left right offset", "i32"),
        ("scale softcap", "fp32"),
    )
    d0, d1 = pieces(width)
    q_row, k_row = strides or (width, width)
    sizes = {"Q_ROW": q_row, "K_ROW": k_row, "STEP": step, "D": width, "D0": d0, "D1": d1}
    flags = {"HAS_LEFT": left, "HAS_RIGHT": right, "HAS_RANGE": ranged, "HAS_SOFTCAP": capped}
    told = [word for word, said in zip(("left", "right", "range", "cap"), flags.values()) if said]
    fixed = launch.fixed(sizes, flags, PRECISION=launch.precision(dtype, arch))
    return Form("-".join((dtype, f"d{width}", *told)), launch.typed(types), fixed, ("q", "k", "lse", "out"))


def forms(arch: str) -> tuple[Form, ...]:
    """Return the forms that are compiled in tests."""
    return (
        form("bf16", arch, 128, right=True),
        form("fp16", arch, 72, left=True, right=True, ranged=True, capped=True),
        form("bf16", arch, 256, right=True),
        form("fp32", arch, 128, right=True),
    )


def configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the configs for a form, the default first; BLOCK_M is what one step of the loop takes."""
    if arch == launch.SMALL:
        return (Config((("BLOCK_M", 16), ("BLOCK_N", 16)), 1, 1),)
    at = dict(shape.constants)
    wide = int(at["D0"] or 0) + int(at["D1"] or 0) > 128
    m, n, warps = (16, 32, 4) if dict(shape.types)["q"] == "*fp32" else (64, 64, 4) if wide else (64, 128, 8)
    return (Config((("BLOCK_M", m), ("BLOCK_N", n)), warps, 1 if arch.startswith("gfx") else 2),)


KERNELS = (Kernel("column_sums", column_sums, forms, configs),)


def add_up(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    left: int,
    right: int,
    offset: int,
    scale: float,
    softcap: float,
    *,
    traced: bool = False,
) -> Tensor:
    """Run `eff::column_sums_v1` (effcompile/ops/column_scores.py says what it means) with the kernel.

    Raises:
        EffError: EFF-K101 for the chip, EFF-K103 for dtypes, EFF-K104 for shapes.
    """
    launch.check(q, k)
    q, k = launch.dense_rows(q), launch.dense_rows(k)
    batch, heads, rows, width = q.shape
    keys = k.shape[2]
    out = torch.empty((batch, heads, keys), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    first, last = launch.ranges(begin, end, batch, keys, q)
    strides, step = launch.strides(q, k)
    arch = launch.architecture_of(q)
    shape = form(
        launch.word(q),
        arch,
        width,
        strides=(int(q.stride(2)), int(k.stride(2))),
        step=step,
        left=left >= 0,
        right=right >= 0,
        ranged=begin is not None or end is not None,
        capped=softcap != 0.0,
    )
    config = configs(shape, arch)[0]
    sizes = (heads, k.shape[1], rows, keys, left, right, offset, scale, softcap)
    tiles = launch.cdiv(keys, config.constants["BLOCK_N"])
    logs = lse.float().contiguous()
    launch.run(
        KERNELS[0], (tiles * batch * heads,), (q, k, logs, out, first, last, *strides, *sizes), shape, config, traced
    )
    return out
