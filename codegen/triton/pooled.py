"""Score block pairs by the product of their mean query and mean key, times the scale; -inf where the band drops the pair whole.

Two kernels: means of blocks of rows, then a small product of means with the mask of blocks. The second reads N / block rows, so the
first, which reads q and k once, is what it costs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effcompile.codegen.triton import launch
from effcompile.codegen.triton.kernel import Config, Form, Kernel


@triton.jit
def pool(
    x, out, begin, end, x_batch, x_head, heads, rows, blocks,
    X_ROW: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    HAS_RANGE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write the mean of one block of rows of one (batch row, head), over the rows in the range; 0 without any."""
    block = tl.program_id(0) % blocks
    owner = tl.program_id(0) // blocks
    batch = owner // heads
    first, last = 0, rows
    if HAS_RANGE:
        first = tl.maximum(tl.load(begin + batch), 0)
        last = tl.minimum(tl.load(end + batch), rows)
    columns = tl.arange(0, WIDTH)
    base = x + (batch.to(tl.int64) * x_batch + (owner % heads).to(tl.int64) * x_head) * STEP
    total = tl.zeros([WIDTH], tl.float32)
    for part in tl.static_range(0, BLOCK, BLOCK_R):
        row = block * BLOCK + part + tl.arange(0, BLOCK_R)
        valid = (row >= first) & (row < last)
        addresses = base + row.to(tl.int64)[:, None] * X_ROW + columns[None, :]
        values = tl.load(addresses, mask=valid[:, None] & (columns < D)[None, :], other=0.0)
        total += tl.sum(values.to(tl.float32), 0)
    count = tl.minimum(block * BLOCK + BLOCK, last) - tl.maximum(block * BLOCK, first)
    mean = total / tl.maximum(count, 1).to(tl.float32)
    tl.store(out + (owner.to(tl.int64) * blocks + block) * D + columns, mean, mask=columns < D)


@triton.jit
def block_products(
    q, k, out, begin, end, heads, kv_heads, q_blocks, kv_blocks, rows, keys, left, right, offset, scale,
    D: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_RANGE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write one tile of block scores of one (batch row, head)."""
    across = tl.cdiv(kv_blocks, BLOCK_N)
    tiles = tl.cdiv(q_blocks, BLOCK_M) * across
    owner = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    batch = owner // heads
    kv_owner = batch * kv_heads + (owner % heads) // (heads // kv_heads)
    m = (tile // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    q_rows = q + (owner.to(tl.int64) * q_blocks + m) * D
    k_rows = k + (kv_owner.to(tl.int64) * kv_blocks + n) * D
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (columns < D)[None, :]
        queries = tl.load(q_rows[:, None] + columns[None, :], mask=(m < q_blocks)[:, None] & inside, other=0.0)
        means = tl.load(k_rows[:, None] + columns[None, :], mask=(n < kv_blocks)[:, None] & inside, other=0.0)
        acc = tl.dot(queries, tl.trans(means), acc, input_precision=PRECISION)
    low, high = n * KV_BLOCK, tl.minimum(n * KV_BLOCK + KV_BLOCK, keys) - 1
    if HAS_RANGE:
        low = tl.maximum(low, tl.load(begin + batch))
        high = tl.minimum(high, tl.load(end + batch) - 1)
    kept = tl.broadcast_to((low <= high)[None, :], (BLOCK_M, BLOCK_N))
    if HAS_LEFT:
        kept = kept & (high[None, :] >= (m * Q_BLOCK + offset - left)[:, None])
    if HAS_RIGHT:
        last = tl.minimum(m * Q_BLOCK + Q_BLOCK, rows) - 1
        kept = kept & (low[None, :] <= (last + offset + right)[:, None])
    where = (owner.to(tl.int64) * q_blocks + m)[:, None] * kv_blocks + n[None, :]
    scores = tl.where(kept, acc * scale, float("-inf"))
    tl.store(out + where, scores, mask=(m < q_blocks)[:, None] & (n < kv_blocks)[None, :])


def pool_form(dtype: str, width: int, block: int, ranged: bool, *, row: int | None = None, step: int = 8) -> Form:
    """Return the form of the means."""
    types = (("x", f"*{dtype}"), ("out", "*fp32"), ("begin end", "*i32"), ("x_batch x_head heads rows blocks", "i32"))
    sizes = {"X_ROW": row or width, "STEP": step, "D": width, "WIDTH": launch.power(width), "BLOCK": block}
    name = f"{dtype}-d{width}-b{block}{'-range' if ranged else ''}"
    return Form(name, launch.typed(types), launch.fixed(sizes, HAS_RANGE=ranged), ("x", "out"))


def pool_configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the config of the means: at most 32 rows at a time."""
    block = int(dict(shape.constants)["BLOCK"] or 0)
    return (Config((("BLOCK_R", launch.divisor(block, 32)),), 1 if arch == launch.SMALL else 4, 1),)


def product_form(
    arch: str, width: int, blocks: tuple[int, int], *, left: bool = False, right: bool = False, ranged: bool = False
) -> Form:
    """Return the form of the products."""
    types = (
        ("q k out", "*fp32"),
        ("begin end", "*i32"),
        ("heads kv_heads q_blocks kv_blocks rows keys left right offset", "i32"),
        ("scale", "fp32"),
    )
    flags = {"HAS_LEFT": left, "HAS_RIGHT": right, "HAS_RANGE": ranged}
    told = [word for word, said in zip(("left", "right", "range"), flags.values()) if said]
    sizes = {"D": width, "Q_BLOCK": blocks[0], "KV_BLOCK": blocks[1]}
    fixed = launch.fixed(sizes, flags, PRECISION=launch.precision("fp32", arch))
    return Form(
        "-".join((f"d{width}-b{blocks[0]}x{blocks[1]}", *told)),
        launch.typed(types),
        fixed,
        ("q", "k", "out"),
    )


def product_configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the config of the products."""
    if arch == launch.SMALL:
        return (Config((("BLOCK_M", 16), ("BLOCK_N", 16), ("BLOCK_D", 16)), 1, 1),)
    return (Config((("BLOCK_M", 64), ("BLOCK_N", 64), ("BLOCK_D", 32)), 4, 1 if arch.startswith("gfx") else 2),)


def pool_forms(arch: str) -> tuple[Form, ...]:
    """Return the forms of the means that are compiled in tests."""
    return (pool_form("bf16", 128, 128, True), pool_form("fp32", 72, 64, False))


def product_forms(arch: str) -> tuple[Form, ...]:
    """Return the forms of the products that are compiled in tests."""
    return (
        product_form(arch, 128, (128, 128), right=True),
        product_form(arch, 72, (64, 64), left=True, right=True, ranged=True),
    )


KERNELS = (
    Kernel("pool", pool, pool_forms, pool_configs),
    Kernel("block_products", block_products, product_forms, product_configs),
)


def score(
    q: Tensor,
    k: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    left: int,
    right: int,
    offset: int,
    q_block: int,
    kv_block: int,
    scale: float,
    *,
    traced: bool = False,
) -> Tensor:
    """Run `eff::pooled_scores_v1` (effcompile/ops/block_scores.py says what it means) with the kernels.

    Raises:
        EffError: EFF-K101 for the chip, EFF-K103 for dtypes, EFF-K104 for shapes.
    """
    launch.check(q, k)
    batch, heads, rows, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    first, last = launch.ranges(begin, end, batch, keys, q)
    ranged = begin is not None or end is not None
    queries = _means(q, q_block, first, last, False, traced)
    means = _means(k, kv_block, first, last, ranged, traced)
    q_blocks, kv_blocks = queries.shape[2], means.shape[2]
    out = queries.new_empty((batch, heads, q_blocks, kv_blocks))
    if out.numel() == 0:
        return out
    arch = launch.architecture_of(q)
    shape = product_form(arch, width, (q_block, kv_block), left=left >= 0, right=right >= 0, ranged=ranged)
    config = product_configs(shape, arch)[0]
    tiles = launch.cdiv(q_blocks, config.constants["BLOCK_M"]) * launch.cdiv(kv_blocks, config.constants["BLOCK_N"])
    sizes = (heads, kv_heads, q_blocks, kv_blocks, rows, keys, left, right, offset, scale)
    launch.run(KERNELS[1], (tiles * batch * heads,), (queries, means, out, first, last, *sizes), shape, config, traced)
    return out


def _means(x: Tensor, block: int, begin: Tensor, end: Tensor, ranged: bool, traced: bool) -> Tensor:
    """Return the mean of each block of rows, float32 `[B, H, ceil(S / block), D]`."""
    x = launch.dense_rows(x)
    batch, heads, rows, width = x.shape
    blocks = launch.cdiv(rows, block)
    out = torch.empty((batch, heads, blocks, width), dtype=torch.float32, device=x.device)
    strides, step = launch.strides(x)
    shape = pool_form(launch.word(x), width, block, ranged, row=int(x.stride(2)), step=step)
    config = pool_configs(shape, launch.architecture_of(x))[0]
    if out.numel():
        runtime = (x, out, begin, end, *strides, heads, rows, blocks)
        launch.run(KERNELS[0], (blocks * batch * heads,), runtime, shape, config, traced)
    return out
