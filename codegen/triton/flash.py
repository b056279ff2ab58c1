"""Compute dense attention with LSE: one pass over the keys with a running softmax (FlashAttention-2, arXiv 2307.08691).

A program owns BLOCK_M query rows of one head and walks over the keys in tiles. Tiles that the mask drops are never visited,
tiles that it keeps whole carry no mask, and only the tiles on its border evaluate it. The head dimension is cut into two
powers of two (`kernel.pieces`). With PACK > 1 the rows of a program are (query, head) pairs of one KV head, so that a short
query block still fills a tile and its keys are read once per group. With TMA, K and V come through tensor descriptors (4-D,
made on the host): the copy engine computes the addresses and fills what lies beyond the end with zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effcompile.codegen.triton import launch
from effcompile.codegen.triton.kernel import Config, Form, Kernel, pieces
from effcompile.codegen.triton.parts import load_queries, logsumexp, store_rows, take_tile

TMA = ("sm_90", "sm_100", "sm_120")
FEW = 32
"""Up to so many queries, the heads of a group share a tile."""


@triton.jit
def span(
    acc0, acc1, high, total, q0, q1, k, v, batch, kv_head, lo, hi, low, top, first, last, scale, softcap,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the tiles of keys that begin at lo, lo + BLOCK_N, ... < hi."""
    for start in tl.range(lo, hi, BLOCK_N):
        acc0, acc1, high, total = take_tile(
            acc0, acc1, high, total, q0, q1, k, v, batch, kv_head, start, low, top, first, last, q0, scale, softcap,
            K_ROW, V_ROW, D, DV, D0, D1, V0, V1, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION, BLOCK_N, TMA, MASKED, MASKED, False,
        )  # fmt: skip
    return acc0, acc1, high, total


@triton.jit
def flash(
    q, k, v, out, lse, begin, end,
    q_batch, q_head, k_batch, k_head, v_batch, v_head, heads, kv_heads, rows, keys, left, right, offset, scale, softcap,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, STEP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    PACK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_RANGE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Run one tile of query rows of one (batch row, head)."""
    tiles = tl.cdiv(rows * PACK, BLOCK_M)
    # The last tiles of a causal mask are the longest: they begin first.
    tile = tiles - 1 - tl.program_id(0) % tiles
    owner = tl.program_id(0) // tiles
    batch = owner // (heads // PACK)
    head = (owner % (heads // PACK)) * PACK
    kv_head = head // (heads // kv_heads)
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = place // PACK
    live = row < rows
    low_row = (tile * BLOCK_M) // PACK
    high_row = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // PACK, rows - 1)

    first, last = 0, keys
    if HAS_RANGE:
        first = tl.maximum(tl.load(begin + batch), 0)
        last = tl.minimum(tl.load(end + batch), keys)
    # Keys of [lo, hi) are kept by some row, those of [lo_full, hi_full) by all.
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

    base = q + (batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head) * STEP
    addresses = row.to(tl.int64) * Q_ROW + (place % PACK).to(tl.int64) * q_head * STEP
    q0 = load_queries(base, addresses, live, D, 0, D0)
    q1 = q0
    if D1 > 0:
        q1 = load_queries(base, addresses, live, D, D0, D1)
    if not TMA:
        k = k + (batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head) * STEP
        v = v + (batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head) * STEP

    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
    acc1 = total
    if V1 > 0:
        acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    low, top = row + (offset - left), row + (offset + right)
    if HAS_LEFT or HAS_RANGE:
        acc0, acc1, high, total = span(
            acc0, acc1, high, total, q0, q1, k, v, batch, kv_head, lo, tl.minimum(lo_full, hi), low, top, first, last,
            scale, softcap, K_ROW, V_ROW, D, DV, D0, D1, V0, V1, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION, BLOCK_N, TMA, True,
        )  # fmt: skip
    acc0, acc1, high, total = span(
        acc0, acc1, high, total, q0, q1, k, v, batch, kv_head, lo_full, hi_full, low, top, first, last, scale, softcap,
        K_ROW, V_ROW, D, DV, D0, D1, V0, V1, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION, BLOCK_N, TMA, False,
    )  # fmt: skip
    acc0, acc1, high, total = span(
        acc0, acc1, high, total, q0, q1, k, v, batch, kv_head, tl.maximum(lo_full, hi_full), hi, low, top, first, last,
        scale, softcap, K_ROW, V_ROW, D, DV, D0, D1, V0, V1, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION, BLOCK_N, TMA, True,
    )  # fmt: skip

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    where = (batch.to(tl.int64) * heads + head + place % PACK) * rows + row
    tl.store(lse + where, logsumexp(high, total), mask=live)
    store_rows(out, where, live, acc0 / divisor, DV, 0)
    if V1 > 0:
        store_rows(out, where, live, acc1 / divisor, DV, V0)


def form(
    dtype: str,
    arch: str,
    width: int,
    value_width: int,
    *,
    strides: tuple[int, int, int] | None = None,
    step: int = 8,
    pack: int = 1,
    left: bool = False,
    right: bool = False,
    ranged: bool = False,
    capped: bool = False,
) -> Form:
    """Return the form for a dtype (`bf16`), head dimensions, and which parts of a mask are there.

    `strides` are those of the rows of q, k and v, in elements; they are constants, because a load whose rows are a constant
    apart takes one address register, not one a row. `step` divides all other strides.
    """
    types = (
        ("q k v out", f"*{dtype}"),
        ("lse", "*fp32"),
        ("begin end", "*i32"),
        ("q_batch q_head k_batch k_head v_batch v_head heads kv_heads rows keys left right offset", "i32"),
        ("scale softcap", "fp32"),
    )
    (d0, d1), (v0, v1) = pieces(width), pieces(value_width)
    flags = {"HAS_LEFT": left, "HAS_RIGHT": right, "HAS_RANGE": ranged, "HAS_SOFTCAP": capped}
    q_row, k_row, v_row = strides or (width, width, value_width)
    sizes = {"Q_ROW": q_row, "K_ROW": k_row, "V_ROW": v_row, "STEP": step}
    sizes |= {"D": width, "DV": value_width, "D0": d0, "D1": d1, "V0": v0, "V1": v1, "PACK": pack}
    told = [word for word, said in zip(("left", "right", "range", "cap"), flags.values()) if said]
    name = "-".join((dtype, f"d{width}" if width == value_width else f"d{width}.{value_width}", *told))
    return Form(
        name if pack == 1 else f"{name}-pack{pack}",
        launch.typed(types),
        launch.fixed(sizes, flags, PRECISION=launch.precision(dtype, arch)),
        ("q", "k", "v", "out", "lse"),
    )


def forms(arch: str) -> tuple[Form, ...]:
    """Return the forms that are compiled in tests: every head dimension, dtype and part of a mask."""
    return (
        form("bf16", arch, 128, 128, right=True),
        form("bf16", arch, 128, 128),
        form("fp16", arch, 128, 128, left=True, right=True, ranged=True),
        form("bf16", arch, 128, 128, right=True, pack=4),
        form("bf16", arch, 64, 64, right=True),
        form("bf16", arch, 72, 72),
        form("bf16", arch, 80, 80),
        form("bf16", arch, 96, 96, right=True),
        form("bf16", arch, 192, 128, right=True),
        form("bf16", arch, 256, 256, right=True),
        form("bf16", arch, 256, 256, right=True, capped=True),
        form("fp32", arch, 64, 64, right=True),
        form("fp32", arch, 128, 128, right=True),
        form("fp32", arch, 256, 256, right=True),
        form("bf16", arch, 64, 64, left=True, right=True, ranged=True, capped=True),
    )


def tiled(shape: Form, m: int, n: int, warps: int, stages: int, tma: bool = False) -> Config:
    """Return the config of these tile sizes."""
    at = dict(shape.constants)
    boxes = (("k", (1, 1, n, int(at["D0"] or 0))), ("v", (1, 1, n, int(at["V0"] or 0)))) if tma else ()
    return Config((("BLOCK_M", m), ("BLOCK_N", n), ("TMA", tma)), warps, stages, boxes)


_Choices = tuple[tuple[int, int, int, int], ...]  # BLOCK_M, BLOCK_N, warps, stages; the default first
_SMALL_MEMORY: tuple[tuple[int, _Choices], ...] = (
    (64, ((128, 64, 4, 2),)),
    (128, ((128, 64, 8, 2),)),
    (192, ((128, 32, 8, 2),)),
    (256, ((64, 32, 8, 2),)),
)
_SHORT: dict[str, tuple[tuple[int, _Choices], ...]] = {
    "sm_80": (
        (64, ((128, 64, 4, 3), (128, 128, 8, 2))),
        (128, ((128, 64, 8, 3),)),
        (192, ((128, 32, 8, 2),)),
        (256, ((64, 32, 8, 2),)),
    ),
    "sm_89": _SMALL_MEMORY,
    "sm_120": _SMALL_MEMORY,
    "sm_90": (
        (64, ((128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3))),
        (128, ((128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2))),
        (192, ((128, 64, 8, 2),)),
        (256, ((128, 64, 8, 2),)),
    ),
    "sm_100": (
        (64, ((128, 128, 8, 2),)),
        (128, ((128, 128, 8, 2), (128, 64, 8, 3))),
        (192, ((128, 64, 8, 2),)),
        (256, ((128, 32, 8, 2), (64, 64, 8, 2))),
    ),
    "amd": ((128, ((128, 64, 4, 1),)), (192, ((128, 32, 4, 1),)), (256, ((64, 32, 4, 1),))),
}
_FLOAT32: dict[str, tuple[tuple[int, _Choices], ...]] = {
    "sm_80": ((64, ((64, 32, 4, 2),)), (128, ((32, 32, 4, 2),)), (256, ((16, 16, 8, 1),))),
    "sm_89": ((64, ((64, 32, 4, 2),)), (128, ((32, 32, 4, 2),)), (256, ((16, 16, 8, 1),))),
    "sm_120": ((64, ((64, 32, 4, 2),)), (128, ((32, 32, 4, 2),)), (256, ((16, 16, 8, 1),))),
    "sm_90": ((64, ((64, 32, 4, 2),)), (128, ((32, 16, 4, 2),)), (256, ((16, 16, 8, 1),))),
    "sm_100": ((64, ((64, 32, 4, 2),)), (128, ((32, 16, 4, 2),)), (256, ((16, 16, 8, 1),))),
    "amd": ((128, ((64, 32, 4, 1),)), (256, ((32, 16, 4, 1),))),
}


def choices(shape: Form, arch: str) -> _Choices:
    """Return (BLOCK_M, BLOCK_N, warps, stages) for a form, the default first; none spills registers."""
    at = dict(shape.constants)
    width = max(int(at["D0"] or 0) + int(at["D1"] or 0), int(at["V0"] or 0) + int(at["V1"] or 0))
    if arch == launch.SMALL:
        return ((16, 16, 1, 1),)
    table = _FLOAT32 if dict(shape.types)["q"] == "*fp32" else _SHORT
    return next(found for limit, found in table[arch if arch in table else "amd"] if width <= limit)


def configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the configs for a form, the default first.

    Triton 3.6 to 3.9 do not specialize the warps of a loop of this kind without spilling, so no config asks for it.
    """
    at = dict(shape.constants)
    found = choices(shape, arch)
    if int(at["PACK"] or 0) > 1 and arch != launch.SMALL:  # few queries: a smaller tile holds them all
        found = ((64, 32, 4, 2),) if found[0][1] > 32 else ((64, 32, 8, 2),)
    plain = tuple(tiled(shape, *choice) for choice in found)
    if arch not in TMA or at["D1"] or at["V1"]:
        return plain
    return (*plain, *(tiled(shape, *choice, tma=True) for choice in found))


KERNELS = (Kernel("flash", flash, forms, configs),)


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
    softcap: float,
    *,
    config: Config | None = None,
    pack: int | None = None,
    traced: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run `eff::flash_v1` (effcompile/ops/flash.py says what it means) with the kernel.

    `config` None takes the default. `pack` heads of a KV head share a tile (None: all of them where the queries are few).

    Raises:
        EffError: EFF-K101 for the chip, EFF-K103 for dtypes, EFF-K104 for shapes.
    """
    launch.check(q, k, v)
    q, scale = launch.positive(q, scale)
    q, k, v = (launch.dense_rows(x) for x in (q, k, v))
    batch, heads, rows, width = q.shape
    kv_heads, keys, group = k.shape[1], k.shape[2], heads // k.shape[1]
    arch = launch.architecture_of(q)
    pack = pack or (group if rows <= FEW else 1)
    strides, step = launch.strides(q, k, v)
    shape = form(
        launch.word(q),
        arch,
        width,
        v.shape[3],
        strides=tuple(int(x.stride(2)) for x in (q, k, v)),  # type: ignore[arg-type]
        step=step,
        pack=pack,
        left=left >= 0,
        right=right >= 0,
        ranged=begin is not None or end is not None,
        capped=softcap != 0.0,
    )
    config = config or launch.choose(configs(shape, arch), (k, v), traced)
    out = v.new_empty((batch, heads, rows, v.shape[3]))
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    first, last = launch.ranges(begin, end, batch, keys, q)
    source = [launch.describe(x, config, name) for name, x in (("k", k), ("v", v))]
    sizes = (heads, kv_heads, rows, keys, left, right, offset, scale, softcap)
    tiles = launch.cdiv(rows * pack, config.constants["BLOCK_M"])
    launch.run(
        KERNELS[0], (tiles * batch * (heads // pack),), (q, *source, out, lse, first, last, *strides, *sizes), shape, config, traced
    )  # fmt: skip
    return out, lse
