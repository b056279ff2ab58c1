"""Multiply blocks of rows by their expert's second weight and scatter them to their slots; then add up each token's slots.

A slot is written by one block and read by one token, so nothing is added up in memory: the sum is in float32, in the order of the
slots, the same in every run. A slot without an expert is neither written nor read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effcompile.codegen.triton import launch
from effcompile.codegen.triton.kernel import Config, Form, Kernel
from effcompile.codegen.triton.moe_parts import (
    FLOATS,
    Weight,
    load_block,
    load_scales,
    load_weight,
    shaped,
    tile_of,
    tiled,
)


@triton.jit
def second(
    x, order, owner, total, shares, w, scales, bias, out,
    w_expert, slots,
    INNER: tl.constexpr, HIDDEN: tl.constexpr, HAS_BIAS: tl.constexpr, SHARED: tl.constexpr, W_STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr, BITS: tl.constexpr, SPAN_N: tl.constexpr, SPAN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Write weight * (W2 x + b2) of BLOCK_N numbers of a block of rows x `[rows, INNER]` to their slots: `out` `[S, HIDDEN]`."""
    TILES: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    blocks = tl.load(total) // BLOCK_M
    if tl.program_id(0) >= blocks * TILES:
        return
    block, tile = tile_of(blocks, TILES, GROUP_M)
    expert = tl.load(owner + block).to(tl.int64)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = tl.load(order + row)
    live = slot < slots
    rows = row.to(tl.int64) * INNER

    NEAT_K: tl.constexpr = INNER % BLOCK_K == 0
    NEAT: tl.constexpr = NEAT_K and HIDDEN % BLOCK_N == 0
    SCALES: tl.constexpr = ((HIDDEN + SPAN_N - 1) // SPAN_N) * (1 if SPAN_K == 0 else (INNER + SPAN_K - 1) // SPAN_K)
    w += expert * w_expert
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if BITS < 16:
        scales += expert * SCALES
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, INNER, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = load_block(x, rows, live, k, INNER, NEAT_K)
        b = load_weight(w, n, k, x, HIDDEN, INNER, W_STRIDE, COLUMNS, BITS, NEAT)
        if BITS < 16 and SPAN_K > 0:
            by = load_scales(scales, n, start, HIDDEN, INNER, SPAN_N, SPAN_K)
            acc += tl.dot(a, b, input_precision=PRECISION) * by[None, :]
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if BITS < 16 and SPAN_K == 0:
        acc *= load_scales(scales, n, 0, HIDDEN, INNER, SPAN_N, SPAN_K)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + expert * HIDDEN + n, mask=n < HIDDEN, other=0.0).to(tl.float32)[None, :]
    if SHARED:
        acc *= tl.load(shares + slot, mask=live, other=0.0).to(tl.float32)[:, None]
    where = out + slot.to(tl.int64)[:, None] * HIDDEN + n[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=live[:, None] & (n < HIDDEN)[None, :])


@triton.jit
def combine(
    parts, ids, out, experts,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up the TOP_K rows of one token, `parts` `[T * TOP_K, HIDDEN]`, those whose expert is there: `out` `[T, HIDDEN]`."""
    TILES: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    token = (tl.program_id(0) // TILES).to(tl.int64)
    n = tl.program_id(0) % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for place in tl.static_range(0, TOP_K):
        slot = token * TOP_K + place
        expert = tl.broadcast_to(tl.load(ids + slot), (BLOCK_N,))
        there = (expert >= 0) & (expert < experts) & (n < HIDDEN)
        acc += tl.load(parts + slot * HIDDEN + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * HIDDEN + n, acc.to(out.dtype.element_ty), mask=n < HIDDEN)


def form(
    dtype: str, arch: str, weight: Weight, block: int, *, biased: bool = False, shared: bool = True, ids: str = "fp32"
) -> Form:
    """Return the form for a weight and blocks of `block` rows; `shared`: the weights of tokens multiply what an expert gives.

    `ids` is Triton's word for the weights of tokens.
    """
    types = (
        ("x bias out", f"*{dtype}"),
        ("w", weight.word),
        ("order owner total", "*i32"),
        ("shares", f"*{ids}"),
        ("scales", "*fp32"),
        ("w_expert slots", "i32"),
    )
    sizes = {"INNER": weight.inputs, "HIDDEN": weight.outputs, "BLOCK_M": block}
    flags = {"HAS_BIAS": biased, "SHARED": shared}
    told = [word for word, said in (("bias", biased), ("in", not shared)) if said]
    kind = [weight.told] if weight.told else []
    name = "-".join((dtype, *kind, f"{weight.inputs}x{weight.outputs}", f"m{block}", *told))
    precision = launch.precision(dtype, arch)
    constants = launch.fixed(sizes, flags, weight.constants, PRECISION=precision)
    return Form(name, launch.typed(types), constants, ("x", "w", "out", "order", "w_expert"))


def forms(arch: str) -> tuple[Form, ...]:
    """Return the forms that are compiled in tests."""
    qwen = shaped("bf16", 2048, 768)
    return (
        form("bf16", arch, qwen, 16),
        form("bf16", arch, qwen, 64),
        form("bf16", arch, qwen, 128),
        form("fp16", arch, shaped("fp16", 2880, 2880, columns=True), 128, biased=True, shared=False),
        form("bf16", arch, shaped("bf16", 2048, 768, bits=8), 16),
        form("bf16", arch, shaped("bf16", 2048, 768, bits=8), 128),
        form("bf16", arch, shaped("bf16", 7168, 2048, bits=FLOATS, span_out=128, span_in=128), 64),
        form("fp32", arch, shaped("fp32", 2048, 768), 64),
    )


def configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the configs for a form, the default first; not yet measured."""
    block = int(dict(shape.constants)["BLOCK_M"] or 0)
    if arch == launch.SMALL:
        return (tiled((16, 16, 2, 1, 1)),)
    large = arch in ("sm_80", "sm_90", "sm_100")
    if dict(shape.types)["x"] == "*fp32":
        return (tiled((32, 32, 1 if block == 16 else 8, 4, 2 if arch.startswith("sm_") else 1)),)
    if arch.startswith("gfx"):
        return (tiled((32, 128, 1, 4, 1)),) if block == 16 else (tiled((128, 64, 8, 4 if block < 128 else 8, 1)),)
    if block == 16:
        first = (64, 128, 1, 4, 4 if large else 3)
        return tuple(tiled(one) for one in (first, (32, 128, 1, 4, 4), (64, 64, 1, 4, 4)))
    if block == 64:
        return tuple(tiled(one) for one in ((128, 64, 8, 4, 3), (256, 64, 8, 8, 3), (128, 32, 8, 4, 4)))
    return tuple(tiled(one) for one in ((128, 64, 8, 8, 3 if large else 2), (256, 64, 8, 8, 3), (128, 32, 8, 8, 3)))


def combine_form(dtype: str, hidden: int, top_k: int, ids: str) -> Form:
    """Return the form of the sum over a token's slots."""
    types = (("parts out", f"*{dtype}"), ("ids", ids), ("experts", "i32"))
    constants = launch.fixed({"HIDDEN": hidden, "TOP_K": top_k})
    return Form(f"{dtype}-{hidden}-k{top_k}", launch.typed(types), constants, ("parts", "out"))


def combine_forms(arch: str) -> tuple[Form, ...]:
    """Return the forms of the sum that are compiled in tests."""
    return combine_form("bf16", 2048, 8, "*i64"), combine_form("bf16", 4096, 2, "*i32")


def combine_configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the config of the sum: a program takes up to 1,024 numbers of a token."""
    return (Config((("BLOCK_N", 64 if arch == launch.SMALL else 1024),), 1 if arch == launch.SMALL else 4, 1),)


KERNELS = (
    Kernel("moe_second", second, forms, configs),
    Kernel("moe_combine", combine, combine_forms, combine_configs),
)
