"""Estimate the attention mass of block pairs from sums along antidiagonals (XAttention, arXiv 2503.16428).

Queries and keys are grouped by the stride S; the score of a pair of groups is one dot product over S * D numbers, with the
queries of a group in reverse order. The first kernel is this product, N^2 D / S multiplications, and keeps of each tile only
the LSE of every key block in it; the second turns the LSEs of a row of groups into probabilities and adds up the rows of a
query block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effcompile.codegen.triton import launch
from effcompile.codegen.triton.kernel import Config, Form, Kernel, pieces
from effcompile.codegen.triton.parts import load_queries
from effcompile.core.errors import EffError


@triton.jit
def group_lse(
    q, k, out, begin, end, q_batch, q_head, k_batch, k_head, heads, kv_heads, rows, keys, groups, kv_blocks, right, offset, scale,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_RANGE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the LSE (in log2) over the key groups of each key block, for one tile of query groups by key groups."""
    per_tile: tl.constexpr = BLOCK_N // PER_BLOCK
    across = tl.cdiv(kv_blocks, per_tile)
    tiles = tl.cdiv(groups, BLOCK_M) * across
    owner = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    batch = owner // heads
    head = owner % heads
    kv_head = head // (heads // kv_heads)
    first, last = 0, keys
    if HAS_RANGE:
        first = tl.maximum(tl.load(begin + batch), 0)
        last = tl.minimum(tl.load(end + batch), keys)
    m = (tile // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    low = n * STRIDE
    kept = tl.broadcast_to(((low + STRIDE > first) & (low < last))[None, :], (BLOCK_M, BLOCK_N))
    # A tile above the diagonal is nothing but -inf.
    reach = STRIDE
    if HAS_RIGHT:
        kept = kept & (low[None, :] <= (m * STRIDE + STRIDE - 1 + offset + right)[:, None])
        seen = ((tile // across) * BLOCK_M + BLOCK_M) * STRIDE - 1 + offset + right >= (
            tile % across
        ) * BLOCK_N * STRIDE
        reach = tl.where(seen, STRIDE, 0)
    q = q + (batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head) * STEP
    k = k + (batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head) * STEP
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, reach):
        row = m * STRIDE + (STRIDE - 1 - step)
        key = low + step
        live = row < rows
        valid = (key >= first) & (key < last)
        q_rows, k_rows = row.to(tl.int64) * Q_ROW, key.to(tl.int64) * K_ROW
        acc = tl.dot(load_queries(q, q_rows, live, D, 0, D0), tl.trans(load_queries(k, k_rows, valid, D, 0, D0)), acc,
                     input_precision=PRECISION)  # fmt: skip
        if D1 > 0:
            acc = tl.dot(load_queries(q, q_rows, live, D, D0, D1), tl.trans(load_queries(k, k_rows, valid, D, D0, D1)), acc,
                         input_precision=PRECISION)  # fmt: skip
    scores = tl.where(kept, acc * (scale * 1.4426950408889634 / STRIDE), float("-inf"))
    scores = tl.reshape(scores, [BLOCK_M, per_tile, PER_BLOCK])
    high = tl.max(scores, 2)
    safe = tl.where(high == float("-inf"), 0.0, high)
    total = tl.sum(tl.exp2(scores - safe[:, :, None]), 2)
    logs = tl.where(total == 0.0, float("-inf"), safe + tl.log2(tl.where(total == 0.0, 1.0, total)))
    block = (tile % across) * per_tile + tl.arange(0, per_tile)
    where = (owner.to(tl.int64) * groups + m)[:, None] * kv_blocks + block[None, :]
    tl.store(out + where, logs, mask=(m < groups)[:, None] & (block < kv_blocks)[None, :])


@triton.jit
def block_mass(
    logs, out, groups, q_blocks, kv_blocks,
    PER_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write one row of block masses: the mean over the query groups of a block of exp2(LSE of a key block - LSE of the row)."""
    block = tl.program_id(0) % q_blocks
    owner = tl.program_id(0) // q_blocks
    place = tl.arange(0, ROWS)
    group = block * PER_BLOCK + place
    live = (place < PER_BLOCK) & (group < groups)
    base = logs + (owner.to(tl.int64) * groups + group)[:, None] * kv_blocks
    high = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, kv_blocks, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        found = tl.load(base + n[None, :], mask=live[:, None] & (n < kv_blocks)[None, :], other=float("-inf"))
        new = tl.maximum(high, tl.max(found, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(high - safe) + tl.sum(tl.exp2(found - safe[:, None]), 1)
        high = new
    there = tl.minimum(groups - block * PER_BLOCK, PER_BLOCK).to(tl.float32)
    safe = tl.where(high == float("-inf"), 0.0, high)
    share = 1.0 / (tl.where(total == 0.0, 1.0, total) * there)
    for start in tl.range(0, kv_blocks, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        found = tl.load(base + n[None, :], mask=live[:, None] & (n < kv_blocks)[None, :], other=float("-inf"))
        mass = tl.sum(tl.exp2(found - safe[:, None]) * share[:, None], 0)
        tl.store(out + (owner.to(tl.int64) * q_blocks + block) * kv_blocks + n, mass, mask=n < kv_blocks)


def form(
    dtype: str,
    arch: str,
    width: int,
    *,
    strides: tuple[int, ...] | None = None,
    step: int = 8,
    stride: int = 16,
    block: int = 128,
    right: bool = False,
    ranged: bool = False,
) -> Form:
    """Return the form of the products for key blocks of `block` keys."""
    types = (
        ("q k", f"*{dtype}"),
        ("out", "*fp32"),
        ("begin end", "*i32"),
        ("q_batch q_head k_batch k_head heads kv_heads rows keys groups kv_blocks right offset", "i32"),
        ("scale", "fp32"),
    )
    d0, d1 = pieces(width)
    q_row, k_row = strides or (width, width)
    sizes = {"Q_ROW": q_row, "K_ROW": k_row, "STEP": step, "D": width, "D0": d0, "D1": d1}
    sizes |= {"STRIDE": stride, "PER_BLOCK": block // stride}
    flags = {"HAS_RIGHT": right, "HAS_RANGE": ranged}
    told = [word for word, said in zip(("right", "range"), flags.values()) if said]
    fixed = launch.fixed(sizes, flags, PRECISION=launch.precision(dtype, arch))
    return Form(
        "-".join((dtype, f"d{width}", f"s{stride}", f"b{block}", *told)),
        launch.typed(types),
        fixed,
        ("q", "k", "out"),
    )


def forms(arch: str) -> tuple[Form, ...]:
    """Return the forms that are compiled in tests."""
    return (
        form("bf16", arch, 128, right=True),
        form("fp16", arch, 64, stride=8, right=True, ranged=True),
        form("bf16", arch, 72),
        form("fp32", arch, 128, right=True),
    )


def configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the configs of the products; a tile holds whole key blocks."""
    at = dict(shape.constants)
    least = int(at["PER_BLOCK"] or 0)
    if arch == launch.SMALL:
        return (Config((("BLOCK_M", 16), ("BLOCK_N", max(16, least))), 1, 1),)
    wide = dict(shape.types)["q"] == "*fp32"
    m, n, warps, stages = (16, 32, 4, 1) if wide else (128, 128, 8, 2)
    return (Config((("BLOCK_M", m), ("BLOCK_N", max(n, least))), warps, 1 if arch.startswith("gfx") else stages),)


def mass_form(per_block: int) -> Form:
    """Return the form of the second kernel, for query blocks of `per_block` groups."""
    types = (("logs out", "*fp32"), ("groups q_blocks kv_blocks", "i32"))
    sizes = {"PER_BLOCK": per_block, "ROWS": launch.power(per_block)}
    return Form(f"r{per_block}", launch.typed(types), launch.fixed(sizes), ("logs", "out"))


def mass_configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the config of the second kernel."""
    if arch == launch.SMALL:
        return (Config((("BLOCK_N", 16),), 1, 1),)
    return (Config((("BLOCK_N", max(32, 2048 // int(dict(shape.constants)["ROWS"] or 1))),), 4, 1),)


KERNELS = (
    Kernel("group_lse", group_lse, forms, configs),
    Kernel("block_mass", block_mass, lambda arch: (mass_form(8), mass_form(64)), mass_configs),
)


def mass(
    q: Tensor,
    k: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    right: int,
    offset: int,
    q_block: int,
    kv_block: int,
    stride: int,
    scale: float,
    *,
    traced: bool = False,
) -> Tensor:
    """Run `eff::antidiagonal_mass_v1` (effcompile/ops/block_scores.py says what it means) with the kernels.

    Raises:
        EffError: EFF-K101 for the chip, EFF-K103 for dtypes, EFF-K104 for shapes, EFF-K105 for a stride that does not divide
        the blocks,
            or a key block that is not a power of two times it.
    """
    launch.check(q, k)
    per_block = kv_block // stride
    if q_block % stride or kv_block % stride or per_block & (per_block - 1) or per_block > 128:
        told = f"blocks of {q_block} x {kv_block} by a stride of {stride}"
        raise EffError("EFF-K105", f"{told}; the stride divides both, and the keys a power of two of times (to 128)")
    q, k = launch.dense_rows(q), launch.dense_rows(k)
    batch, heads, rows, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    groups, q_blocks, kv_blocks = launch.cdiv(rows, stride), launch.cdiv(rows, q_block), launch.cdiv(keys, kv_block)
    out = torch.empty((batch, heads, q_blocks, kv_blocks), dtype=torch.float32, device=q.device)
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
        stride=stride,
        block=kv_block,
        right=right >= 0,
        ranged=begin is not None or end is not None,
    )
    config = configs(shape, arch)[0]
    logs = torch.empty((batch, heads, groups, kv_blocks), dtype=torch.float32, device=q.device)
    sizes = (heads, kv_heads, rows, keys, groups, kv_blocks, right, offset, scale)
    tiles = launch.cdiv(groups, config.constants["BLOCK_M"])
    tiles *= launch.cdiv(kv_blocks, int(config.constants["BLOCK_N"] or 0) // per_block)
    launch.run(KERNELS[0], (tiles * batch * heads,), (q, k, logs, first, last, *strides, *sizes), shape, config, traced)
    second = mass_form(q_block // stride)
    runtime = (logs, out, groups, q_blocks, kv_blocks)
    launch.run(KERNELS[1], (q_blocks * batch * heads,), runtime, second, mass_configs(second, arch)[0], traced)
    return out
