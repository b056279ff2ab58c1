"""Round queries and keys to int8, one scale a block of rows, the keys minus their mean (SageAttention, arXiv 2410.02367).

No softmax sees the mean of the keys, but without it the rounding keeps what tells keys apart. It is added up in chunks, one
program a chunk, and torch adds the chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effcompile.codegen.triton import launch
from effcompile.codegen.triton.kernel import Config, Form, Kernel
from effcompile.codegen.triton.parts import load_queries, store_rows


@triton.jit
def key_sums(
    k, out, begin, end, k_batch, k_head, heads, rows, chunks,
    K_ROW: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, HAS_RANGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write the sum of one chunk of keys of one (batch row, KV head), over the range: float32 `[B, Hkv, chunks, D]`."""
    chunk = tl.program_id(0) % chunks
    owner = tl.program_id(0) // chunks
    batch = owner // heads
    first, last = 0, rows
    if HAS_RANGE:
        first = tl.maximum(tl.load(begin + batch), 0)
        last = tl.minimum(tl.load(end + batch), rows)
    columns = tl.arange(0, WIDTH)
    base = k + (batch.to(tl.int64) * k_batch + (owner % heads).to(tl.int64) * k_head) * STEP
    total = tl.zeros([WIDTH], tl.float32)
    for part in tl.range(0, CHUNK, BLOCK_R):
        row = chunk * CHUNK + part + tl.arange(0, BLOCK_R)
        valid = (row >= first) & (row < last)
        found = load_queries(base, row.to(tl.int64) * K_ROW, valid, D, 0, WIDTH)
        total += tl.sum(found.to(tl.float32), 0)
    tl.store(out + (owner.to(tl.int64) * chunks + chunk) * D + columns, total, mask=columns < D)


@triton.jit
def quantize(
    x, mean, out, scales, shifts, begin, end, x_batch, x_head, heads, mean_heads, rows, blocks, factor,
    X_ROW: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SMOOTH: tl.constexpr, HAS_RANGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Round one block of rows to int8 with one scale; with SMOOTH minus the mean, else write factor * (row . mean) to `shifts`."""
    block = tl.program_id(0) % blocks
    owner = tl.program_id(0) // blocks
    batch = owner // heads
    head = owner % heads
    first, last = 0, rows
    if HAS_RANGE:
        first = tl.maximum(tl.load(begin + batch), 0)
        last = tl.minimum(tl.load(end + batch), rows)
    row = block * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)
    valid = (row >= first) & (row < last)
    base = x + (batch.to(tl.int64) * x_batch + head.to(tl.int64) * x_head) * STEP
    values = load_queries(base, row.to(tl.int64) * X_ROW, valid, D, 0, WIDTH).to(tl.float32)
    mean_head = batch * mean_heads + head // (heads // mean_heads)
    center = tl.load(mean + mean_head.to(tl.int64) * D + columns, mask=columns < D, other=0.0)
    where = owner.to(tl.int64) * rows + row
    if SMOOTH:
        values = tl.where(valid[:, None], values - center[None, :], 0.0)
    else:
        tl.store(shifts + where, tl.sum(values * center[None, :], 1) * factor, mask=row < rows)
    most = tl.max(tl.max(tl.abs(values), 1), 0)
    scale = tl.where(most > 0.0, most / 127.0, 1.0)
    # Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even.
    rounded = (values / scale + 12582912.0) - 12582912.0
    rounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0)
    store_rows(out, where, row < rows, rounded, D, 0)
    tl.store(scales + owner.to(tl.int64) * blocks + block, scale)


CHUNK = 1024


def sums_form(dtype: str, width: int, ranged: bool, *, row: int | None = None, step: int = 8) -> Form:
    """Return the form of the sums of keys."""
    types = (("k", f"*{dtype}"), ("out", "*fp32"), ("begin end", "*i32"), ("k_batch k_head heads rows chunks", "i32"))
    sizes = {
        "K_ROW": row or width,
        "STEP": step,
        "D": width,
        "WIDTH": launch.power(width),
        "CHUNK": CHUNK,
        "HAS_RANGE": ranged,
    }
    return Form(f"{dtype}-d{width}{'-range' if ranged else ''}", launch.typed(types), launch.fixed(sizes), ("k", "out"))


def sums_forms(arch: str) -> tuple[Form, ...]:
    """Return the forms of the sums that are compiled in tests."""
    return (sums_form("bf16", 128, True),)


def sums_configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the config of the sums."""
    return (Config((("BLOCK_R", 256 if arch == launch.SMALL else 32),), 1 if arch == launch.SMALL else 4, 2),)


def quantize_form(
    dtype: str, width: int, block: int, smooth: bool, ranged: bool = False, *, row: int | None = None, step: int = 8
) -> Form:
    """Return the form of the rounding: `smooth` for keys."""
    types = (
        ("x", f"*{dtype}"),
        ("out", "*i8"),
        ("mean scales shifts", "*fp32"),
        ("begin end", "*i32"),
        ("x_batch x_head heads mean_heads rows blocks", "i32"),
        ("factor", "fp32"),
    )
    sizes = {"X_ROW": row or width, "STEP": step, "D": width, "WIDTH": launch.power(width), "BLOCK": block}
    flags = {"SMOOTH": smooth, "HAS_RANGE": ranged}
    name = "-".join((dtype, f"d{width}", "k" if smooth else "q", *(("range",) if ranged else ())))
    return Form(name, launch.typed(types), launch.fixed(sizes, flags), ("x", "out", "mean", "scales", "shifts"))


def quantize_forms(arch: str) -> tuple[Form, ...]:
    """Return the forms of the rounding that are compiled in tests."""
    return (quantize_form("fp16", 128, 128, False), quantize_form("bf16", 72, 64, True, True))


def quantize_configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the config of the rounding: a block of rows is one tile."""
    return (Config((), 1 if arch == launch.SMALL else 8, 1),)


KERNELS = (
    Kernel("quantize", quantize, quantize_forms, quantize_configs),
    Kernel("key_sums", key_sums, sums_forms, sums_configs),
)


def key_mean(k: Tensor, edges: tuple[Tensor, Tensor], ranged: bool, traced: bool) -> Tensor:
    """Return the mean key over the range, float32 `[B, Hkv, D]`; 0 without keys."""
    batch, heads, keys, width = k.shape
    chunks = launch.cdiv(keys, CHUNK)
    sums = torch.empty((batch, heads, chunks, width), dtype=torch.float32, device=k.device)
    strides, step = launch.strides(k)
    shape = sums_form(launch.word(k), width, ranged, row=int(k.stride(2)), step=step)
    if sums.numel():
        config = sums_configs(shape, launch.architecture_of(k))[0]
        launch.run(
            KERNELS[1],
            (chunks * batch * heads,),
            (k, sums, *edges, *strides, heads, keys, chunks),
            shape,
            config,
            traced,
        )
    if not ranged:
        return sums.sum(2) / max(keys, 1)
    count = (edges[1].clamp(max=keys) - edges[0].clamp(min=0)).clamp(min=1)
    return sums.sum(2) / count[:, None, None]


def rounded(
    x: Tensor,
    mean: Tensor,
    block: int,
    edges: tuple[Tensor, Tensor],
    ranged: bool,
    smooth: bool,
    factor: float,
    traced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (int8 rows, a scale for each block, factor * row . mean)."""
    batch, heads, rows, width = x.shape
    blocks = launch.cdiv(rows, block)
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((batch, heads, blocks), dtype=torch.float32, device=x.device)
    shifts = torch.empty((0,) if smooth else (batch, heads, rows), dtype=torch.float32, device=x.device)
    strides, step = launch.strides(x)
    shape = quantize_form(launch.word(x), width, block, smooth, ranged, row=int(x.stride(2)), step=step)
    if out.numel():
        sizes = (heads, mean.shape[1], rows, blocks, factor)
        runtime = (x, mean, out, scales, scales if smooth else shifts, *edges, *strides, *sizes)
        launch.run(
            KERNELS[0],
            (blocks * batch * heads,),
            runtime,
            shape,
            quantize_configs(shape, launch.architecture_of(x))[0],
            traced,
        )
    return out, scales, shifts
