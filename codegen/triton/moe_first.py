"""Multiply blocks of rows by their expert's first weight and apply the gate: gathered from the tokens, in one kernel.

The product is never in memory: gate and up are tiles of the same program, side by side in the accumulator where the weights have
them in turn (`interleaved`), in two accumulators where one half follows the other (`concat`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from effcompile.codegen.triton import launch
from effcompile.codegen.triton.kernel import Config, Constant, Form, Kernel
from effcompile.codegen.triton.moe_parts import (
    FLOATS,
    Weight,
    gated,
    load_block,
    load_scales,
    load_weight,
    shaped,
    tile_of,
    tiled,
)


@triton.jit
def first(
    x, order, owner, total, shares, w, scales, bias, out,
    x_row, w_expert, slots, alpha, beta, limit,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr, LAYOUT: tl.constexpr, ACT: tl.constexpr,
    HAS_LIMIT: tl.constexpr, HAS_BIAS: tl.constexpr, SHARED: tl.constexpr,
    W_STRIDE: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr,
    SPAN_N: tl.constexpr, SPAN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Write gate(W1 x + b1) of BLOCK_N numbers of a block of rows: `out` `[rows, INNER]`, in the order of the rows."""
    TILES: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    blocks = tl.load(total) // BLOCK_M
    if tl.program_id(0) >= blocks * TILES:
        return
    block, tile = tile_of(blocks, TILES, GROUP_M)
    expert = tl.load(owner + block).to(tl.int64)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = tl.load(order + row)
    live = slot < slots
    rows = (slot // TOP_K).to(tl.int64) * x_row

    PAIRS: tl.constexpr = LAYOUT == "interleaved"
    SPLIT: tl.constexpr = LAYOUT == "concat"
    WIDE: tl.constexpr = BLOCK_N * 2 if PAIRS else BLOCK_N
    WIDTH: tl.constexpr = INNER if LAYOUT == "none" else 2 * INNER
    NEAT_K: tl.constexpr = HIDDEN % BLOCK_K == 0
    NEAT: tl.constexpr = NEAT_K and INNER % BLOCK_N == 0
    SCALES: tl.constexpr = ((WIDTH + SPAN_N - 1) // SPAN_N) * (1 if SPAN_K == 0 else (HIDDEN + SPAN_K - 1) // SPAN_K)
    w += expert * w_expert
    n = tile * WIDE + tl.arange(0, WIDE)
    # Beyond the first half there is the second: what is read there belongs to columns that are not stored.
    upper = INNER + n
    if BITS < 16:
        scales += expert * SCALES
    if SHARED:
        share = tl.load(shares + slot, mask=live, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_M, WIDE], tl.float32)
    up = tl.zeros([BLOCK_M, WIDE], tl.float32)
    for start in tl.range(0, HIDDEN, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = load_block(x, rows, live, k, HIDDEN, NEAT_K)
        if SHARED:
            a = (a.to(tl.float32) * share[:, None]).to(a.dtype)
        b = load_weight(w, n, k, x, WIDTH, HIDDEN, W_STRIDE, COLUMNS, BITS, NEAT)
        if BITS < 16 and SPAN_K > 0:
            by = load_scales(scales, n, start, WIDTH, HIDDEN, SPAN_N, SPAN_K)
            acc += tl.dot(a, b, input_precision=PRECISION) * by[None, :]
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if SPLIT:
            b = load_weight(w, upper, k, x, WIDTH, HIDDEN, W_STRIDE, COLUMNS, BITS, NEAT)
            if BITS < 16 and SPAN_K > 0:
                by = load_scales(scales, upper, start, WIDTH, HIDDEN, SPAN_N, SPAN_K)
                up += tl.dot(a, b, input_precision=PRECISION) * by[None, :]
            else:
                up = tl.dot(a, b, up, input_precision=PRECISION)
    if BITS < 16 and SPAN_K == 0:
        acc *= load_scales(scales, n, 0, WIDTH, HIDDEN, SPAN_N, SPAN_K)[None, :]
        if SPLIT:
            up *= load_scales(scales, upper, 0, WIDTH, HIDDEN, SPAN_N, SPAN_K)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + expert * WIDTH + n, mask=n < WIDTH, other=0.0).to(tl.float32)[None, :]
        if SPLIT:
            up += tl.load(bias + expert * WIDTH + upper, mask=upper < WIDTH, other=0.0).to(tl.float32)[None, :]
    if PAIRS:
        g, u = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N, 2]))
        y = gated(g, u, alpha, beta, limit, ACT, True, HAS_LIMIT)
    else:
        y = gated(acc, up, alpha, beta, limit, ACT, SPLIT, HAS_LIMIT)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    where = out + row.to(tl.int64)[:, None] * INNER + column[None, :]
    tl.store(where, y.to(out.dtype.element_ty), mask=live[:, None] & (column < INNER)[None, :])


def form(
    dtype: str,
    arch: str,
    weight: Weight,
    top_k: int,
    block: int,
    *,
    act: str = "silu",
    layout: str = "concat",
    limited: bool = False,
    biased: bool = False,
    shared: bool = False,
    ids: str = "fp32",
) -> Form:
    """Return the form for a weight and a gate, blocks of `block` rows; `shared`: the weights of tokens multiply what an expert
    gets.

    `ids` is Triton's word for the weights of tokens.
    """
    inner = weight.outputs if layout == "none" else weight.outputs // 2
    types = (
        ("x bias out", f"*{dtype}"),
        ("w", weight.word),
        ("order owner total", "*i32"),
        ("shares", f"*{ids}"),
        ("scales", "*fp32"),
        ("x_row w_expert slots", "i32"),
        ("alpha beta limit", "fp32"),
    )
    sizes: dict[str, Constant] = {
        "HIDDEN": weight.inputs,
        "INNER": inner,
        "TOP_K": top_k,
        "LAYOUT": layout,
        "ACT": act,
        "BLOCK_M": block,
    }
    flags = {"HAS_LIMIT": limited, "HAS_BIAS": biased, "SHARED": shared}
    told = [word for word, said in zip(("limit", "bias", "in"), flags.values()) if said]
    kind = [weight.told] if weight.told else []
    name = "-".join(
        (dtype, *kind, f"{weight.inputs}x{inner}", f"m{block}", layout, *([act] if act != "silu" else []), *told)
    )
    precision = launch.precision(dtype, arch)
    constants = launch.fixed(sizes, flags, weight.constants, PRECISION=precision)
    return Form(name, launch.typed(types), constants, ("x", "w", "out", "order", "x_row", "w_expert"))


def forms(arch: str) -> tuple[Form, ...]:
    """Return the forms that are compiled in tests: prefill and decode, every layout of weights and gates, 8 bits."""
    qwen = shaped("bf16", 1536, 2048)
    oss = shaped("bf16", 5760, 2880, columns=True)
    return (
        form("bf16", arch, qwen, 8, 16),
        form("bf16", arch, qwen, 8, 64),
        form("bf16", arch, qwen, 8, 128),
        form("bf16", arch, oss, 4, 16, layout="interleaved", limited=True, biased=True),
        form("bf16", arch, oss, 4, 128, layout="interleaved", limited=True, biased=True),
        form("fp16", arch, shaped("fp16", 2048, 2048), 2, 64, act="relu2", layout="none", shared=True),
        form("bf16", arch, shaped("bf16", 1536, 2048, bits=8), 8, 16),
        form("bf16", arch, shaped("bf16", 1536, 2048, bits=8), 8, 128),
        form("bf16", arch, shaped("bf16", 4096, 7168, bits=FLOATS, span_out=128, span_in=128), 8, 64),
        form("fp32", arch, shaped("fp32", 1536, 2048), 8, 64, act="gelu"),
    )


def configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the configs for a form, the default first; not yet measured. With a gate a tile is two of BLOCK_N columns."""
    at = dict(shape.constants)
    block, pair = int(at["BLOCK_M"] or 0), at["LAYOUT"] != "none"
    if arch == launch.SMALL:
        return (tiled((16, 16, 2, 1, 1)),)
    large = arch in ("sm_80", "sm_90", "sm_100")
    if dict(shape.types)["x"] == "*fp32":
        return (tiled((32, 32, 1 if block == 16 else 8, 4, 2 if arch.startswith("sm_") else 1)),)
    if arch.startswith("gfx"):
        return (tiled((32, 128, 1, 4, 1)),) if block == 16 else (tiled((64, 64, 8, 4 if block < 128 else 8, 1)),)
    if block == 16:
        first = (32, 128, 1, 4, 4 if large else 2)
        return tuple(tiled(one) for one in (first, (64, 64, 1, 4, 4 if large else 3), (32, 64, 1, 4, 4)))
    n = 64 if pair else 128
    if block == 64:
        # Scales that change on the way need a sum of their own: with 4 warps that spills.
        warps = 8 if at["SPAN_K"] and not large else 4
        return tuple(
            tiled(one) for one in ((n, 64, 8, warps, 3 if large else 2), (n * 2, 64, 8, 8, 3), (n, 32, 8, 4, 3))
        )
    return tuple(tiled(one) for one in ((n, 64, 8, 8, 3 if large else 2), (n * 2, 64, 8, 8, 3), (n, 32, 8, 8, 3)))


KERNELS = (Kernel("moe_first", first, forms, configs),)
