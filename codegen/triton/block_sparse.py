"""Compute attention over lists of key blocks in FlexAttention's format, with LSE and the epilogue O * row_scale + addend.

A program owns BLOCK_M query rows, all of one query block, and walks the two lists of that block: partial blocks under the
element mask, full blocks without it. A block is cut into tiles of BLOCK_N keys, so the size of the blocks and that of the
tiles are tuned apart.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effcompile.codegen.triton import flash as dense
from effcompile.codegen.triton import launch
from effcompile.codegen.triton.kernel import Config, Form, Kernel, pieces
from effcompile.codegen.triton.parts import load_queries, logsumexp, store_rows, take_tile
from effcompile.core.errors import EffError


@triton.jit
def listed(
    acc0, acc1, high, total, q0, q1, k, v, batch, kv_head, count, entries, low, top, first, last, key_mask, scale, softcap,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, KV_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, BOUNDED: tl.constexpr,
    BANDED: tl.constexpr, HAS_KEYS: tl.constexpr,
):  # fmt: skip
    """Take the blocks of one list, `count` entries long."""
    per_block: tl.constexpr = KV_BLOCK // BLOCK_N
    for step in tl.range(0, count * per_block):
        start = tl.load(entries + step // per_block) * KV_BLOCK + (step % per_block) * BLOCK_N
        acc0, acc1, high, total = take_tile(
            acc0, acc1, high, total, q0, q1, k, v, batch, kv_head, start, low, top, first, last, key_mask, scale,
            softcap, K_ROW, V_ROW, D, DV, D0, D1, V0, V1, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION, BLOCK_N, TMA, BOUNDED,
            BANDED, HAS_KEYS,
        )  # fmt: skip
    return acc0, acc1, high, total


@triton.jit
def block_sparse(
    q, k, v, out, lse, counts, indices, full_counts, full_indices, begin, end, row_first, row_last, key_mask, row_scale, addend,
    q_batch, q_head, k_batch, k_head, v_batch, v_head, heads, kv_heads, rows, keys, left, right, offset, scale, softcap,
    list_batches, list_heads, list_rows, width, full_width, limit_batches, key_batches,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, STEP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, EVEN: tl.constexpr, HAS_FULL: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_RANGE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_LIMITS: tl.constexpr, HAS_KEYS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_ADDEND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Run one tile of query rows of one (batch row, head)."""
    tiles = tl.cdiv(rows, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    owner = tl.program_id(0) // tiles
    batch = owner // heads
    head = owner % heads
    kv_head = head // (heads // kv_heads)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < rows
    first, last = 0, keys
    if HAS_RANGE:
        first = tl.maximum(tl.load(begin + batch), 0)
        last = tl.minimum(tl.load(end + batch), keys)

    base = q + (batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head) * STEP
    q0 = load_queries(base, row.to(tl.int64) * Q_ROW, live, D, 0, D0)
    q1 = q0
    if D1 > 0:
        q1 = load_queries(base, row.to(tl.int64) * Q_ROW, live, D, D0, D1)
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
    if HAS_LIMITS:
        limits = (batch % limit_batches).to(tl.int64) * rows + row
        low = tl.load(row_first + limits, mask=live, other=0)
        top = tl.load(row_last + limits, mask=live, other=-1)
    if HAS_KEYS:
        key_mask = key_mask + (batch % key_batches).to(tl.int64) * keys
    # Lists may be shared by all batch rows (list_batches 1) and by groups of heads.
    line = (batch % list_batches) * list_heads + head // (heads // list_heads)
    line = line.to(tl.int64) * list_rows + (tile * BLOCK_M) // Q_BLOCK
    acc0, acc1, high, total = listed(
        acc0, acc1, high, total, q0, q1, k, v, batch, kv_head, tl.load(counts + line), indices + line * width, low, top,
        first, last, key_mask, scale, softcap, K_ROW, V_ROW, D, DV, D0, D1, V0, V1, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
        PRECISION, KV_BLOCK, BLOCK_N, TMA, True, True, HAS_KEYS,
    )  # fmt: skip
    if HAS_FULL:
        acc0, acc1, high, total = listed(
            acc0, acc1, high, total, q0, q1, k, v, batch, kv_head, tl.load(full_counts + line),
            full_indices + line * full_width, low, top, 0, keys, key_mask, scale, softcap, K_ROW, V_ROW, D, DV, D0, D1,
            V0, V1, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION, KV_BLOCK, BLOCK_N, TMA, not EVEN, False, False,
        )  # fmt: skip

    where = owner.to(tl.int64) * rows + row
    tl.store(lse + where, logsumexp(high, total), mask=live)
    factor = 1.0 / tl.where(total == 0.0, 1.0, total)
    if HAS_SCALE:
        factor = factor * tl.load(row_scale + where, mask=live, other=0.0)
    acc0 = acc0 * factor[:, None]
    if HAS_ADDEND:
        acc0 += load_queries(addend, where * DV, live, DV, 0, V0)
    store_rows(out, where, live, acc0, DV, 0)
    if V1 > 0:
        acc1 = acc1 * factor[:, None]
        if HAS_ADDEND:
            acc1 += load_queries(addend, where * DV, live, DV, V0, V1)
        store_rows(out, where, live, acc1, DV, V0)


def form(
    dtype: str,
    arch: str,
    width: int,
    value_width: int,
    *,
    strides: tuple[int, ...] | None = None,
    step: int = 8,
    blocks: tuple[int, int] = (128, 128),
    even: bool = True,
    full: bool = True,
    left: bool = False,
    right: bool = False,
    ranged: bool = False,
    capped: bool = False,
    limited: bool = False,
    keyed: bool = False,
    scaled: bool = False,
    added: bool = False,
) -> Form:
    """Return the form; the arguments that the dense kernel has too are as in `flash.form`.

    `blocks` are the sizes (queries, keys) of the blocks in the lists; `even` says that they divide the keys.
    """
    types = (
        ("q k v out addend", f"*{dtype}"),
        ("lse row_scale", "*fp32"),
        ("counts indices full_counts full_indices begin end row_first row_last", "*i32"),
        ("key_mask", "*u8"),
        ("q_batch q_head k_batch k_head v_batch v_head heads kv_heads rows keys left right offset", "i32"),
        ("list_batches list_heads list_rows width full_width limit_batches key_batches", "i32"),
        ("scale softcap", "fp32"),
    )
    (d0, d1), (v0, v1) = pieces(width), pieces(value_width)
    q_row, k_row, v_row = strides or (width, width, value_width)
    flags = {"HAS_LEFT": left, "HAS_RIGHT": right, "HAS_RANGE": ranged, "HAS_SOFTCAP": capped}
    flags |= {
        "HAS_LIMITS": limited,
        "HAS_KEYS": keyed,
        "HAS_SCALE": scaled,
        "HAS_ADDEND": added,
        "HAS_FULL": full,
        "EVEN": even,
    }
    sizes = {"Q_ROW": q_row, "K_ROW": k_row, "V_ROW": v_row, "STEP": step}
    sizes |= {"D": width, "DV": value_width, "D0": d0, "D1": d1, "V0": v0, "V1": v1}
    sizes |= {"Q_BLOCK": blocks[0], "KV_BLOCK": blocks[1]}
    told = [
        word
        for word, said in zip(("left", "right", "range", "cap", "limits", "keys", "scale", "add"), flags.values())
        if said
    ]
    shape = f"d{width}" if width == value_width else f"d{width}.{value_width}"
    return Form(
        "-".join((dtype, shape, f"b{blocks[0]}x{blocks[1]}", *told)),
        launch.typed(types),
        launch.fixed(sizes, flags, PRECISION=launch.precision(dtype, arch)),
        ("q", "k", "v", "out", "lse", "addend"),
    )


def forms(arch: str) -> tuple[Form, ...]:
    """Return the forms that are compiled in tests."""
    return (
        form("bf16", arch, 128, 128, right=True),
        form("bf16", arch, 64, 64, scaled=True, added=True),
        form("bf16", arch, 72, 72, blocks=(64, 64), scaled=True, added=True, even=False),
        form("fp16", arch, 128, 128, left=True, right=True, ranged=True, even=False),
        form("bf16", arch, 128, 128, left=True, right=True, limited=True, keyed=True),
        form("bf16", arch, 192, 128, right=True),
        form("bf16", arch, 256, 256, right=True, even=False),
        form("fp32", arch, 64, 64, blocks=(64, 64), right=True, scaled=True, added=True),
    )


def _choices(shape: Form, arch: str) -> tuple[tuple[int, int, int, int], ...]:
    """Return (BLOCK_M, BLOCK_N, warps, stages), the default first: the dense kernel's where they do not spill here.

    Following a list takes a few registers more than counting, and a third stage can fetch its entries ahead.
    """
    at = dict(shape.constants)
    width = max(int(at["D0"] or 0) + int(at["D1"] or 0), int(at["V0"] or 0) + int(at["V1"] or 0))
    if arch == launch.SMALL:
        return dense.choices(shape, arch)
    if dict(shape.types)["q"] == "*fp32" and width <= 64:
        return ((32, 32, 4, 2),)
    if dict(shape.types)["q"] != "*fp32":
        if arch == "sm_80" and width <= 64:
            return ((128, 64, 8, 3), (64, 64, 4, 3))
        if arch in ("sm_80", "sm_89", "sm_120") and 64 < width <= 128 and (at["HAS_LIMITS"] or at["HAS_KEYS"]):
            return ((128, 32, 8, 2),)
        if arch in ("sm_90", "sm_100") and width <= 128:
            return ((128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2))
        if arch == "sm_90" and width > 192:
            return ((64, 64, 8, 2), (128, 32, 8, 2))
    return dense.choices(shape, arch)


def configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the configs for a form, the default first; tiles are cut down to what divides the blocks.

    Raises:
        EffError: EFF-K105 where a block is no multiple of 16.
    """
    at = dict(shape.constants)
    blocks = int(at["Q_BLOCK"] or 0), int(at["KV_BLOCK"] or 0)
    if any(block % 16 for block in blocks):
        raise EffError("EFF-K105", f"blocks of {blocks[0]} x {blocks[1]}; the kernels take multiples of 16")
    found = {}
    for choice in _choices(shape, arch):
        m, n = (launch.divisor(block, size) for block, size in zip(blocks, choice[:2]))
        found[m, n, *choice[2:]] = True
    tma = arch in dense.TMA and not at["D1"] and not at["V1"]
    plain = tuple(tiled(shape, *choice) for choice in found)
    return (*plain, *(tiled(shape, *choice, tma=True) for choice in found)) if tma else plain


def tiled(shape: Form, m: int, n: int, warps: int, stages: int, tma: bool = False) -> Config:
    """Return the config of these tile sizes."""
    at = dict(shape.constants)
    boxes = (("k", (1, 1, n, int(at["D0"] or 0))), ("v", (1, 1, n, int(at["V0"] or 0)))) if tma else ()
    return Config((("BLOCK_M", m), ("BLOCK_N", n), ("TMA", tma)), warps, stages, boxes)


KERNELS = (Kernel("block_sparse", block_sparse, forms, configs),)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    full_kv_num_blocks: Tensor | None,
    full_kv_indices: Tensor | None,
    begin: Tensor | None,
    end: Tensor | None,
    row_first: Tensor | None,
    row_last: Tensor | None,
    key_mask: Tensor | None,
    row_scale: Tensor | None,
    addend: Tensor | None,
    left: int,
    right: int,
    offset: int,
    q_block: int,
    kv_block: int,
    scale: float,
    softcap: float,
    *,
    config: Config | None = None,
    traced: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run `eff::block_sparse_v1` (effcompile/ops/block_sparse.py says what it means) with the kernel.

    Raises:
        EffError: EFF-K101 for the chip, EFF-K103 for dtypes, EFF-K104 for shapes, EFF-K105 for block sizes and lists.
    """
    launch.check(q, k, v)
    q, scale = launch.positive(q, scale)
    q, k, v = (launch.dense_rows(x) for x in (q, k, v))
    batch, heads, rows, width = q.shape
    keys, full = k.shape[2], full_kv_num_blocks is not None and full_kv_indices is not None
    lists = [
        kv_num_blocks,
        kv_indices,
        full_kv_num_blocks if full else kv_num_blocks,
        full_kv_indices if full else kv_indices,
    ]
    counts, indices, full_counts, full_indices = (x.to(torch.int32).contiguous() for x in lists if x is not None)
    _check(counts, indices, full_counts, full_indices, (batch, heads, -(-rows // q_block)))
    strides, step = launch.strides(q, k, v)
    limits = _limits(row_first, row_last, left, right, offset, rows, q.device)
    arch = launch.architecture_of(q)
    shape = form(
        launch.word(q),
        arch,
        width,
        v.shape[3],
        strides=tuple(int(x.stride(2)) for x in (q, k, v)),
        step=step,
        blocks=(q_block, kv_block),
        even=keys % kv_block == 0,
        full=full,
        left=left >= 0 or limits is not None,
        right=right >= 0 or limits is not None,
        ranged=begin is not None or end is not None,
        capped=softcap != 0.0,
        limited=limits is not None,
        keyed=key_mask is not None,
        scaled=row_scale is not None,
        added=addend is not None,
    )
    config = config or launch.choose(configs(shape, arch), (k, v), traced)
    out = v.new_empty((batch, heads, rows, v.shape[3]))
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    first, last = launch.ranges(begin, end, batch, keys, q)
    bounds = (counts, counts) if limits is None else limits
    mask = counts if key_mask is None else key_mask.to(torch.uint8).contiguous()
    scales = lse if row_scale is None else row_scale.float().expand(batch, heads, rows).contiguous()
    added = out if addend is None else addend.expand(out.shape).contiguous()
    source = [launch.describe(x, config, name) for name, x in (("k", k), ("v", v))]
    runtime = (
        *(q, *source, out, lse, counts, indices, full_counts, full_indices, first, last, *bounds, mask, scales, added),
        *(*strides, heads, k.shape[1], rows, keys, left, right, offset, scale, softcap),
        *(counts.shape[0], counts.shape[1], counts.shape[2], indices.shape[3], full_indices.shape[3]),
        *(bounds[0].shape[0], mask.shape[0]),
    )
    tiles = launch.cdiv(rows, config.constants["BLOCK_M"])
    launch.run(KERNELS[0], (tiles * batch * heads,), runtime, shape, config, traced)
    return out, lse


def _check(
    counts: Tensor, indices: Tensor, full_counts: Tensor, full_indices: Tensor, wanted: tuple[int, int, int]
) -> None:
    batch, heads, blocks = wanted
    told = f"counts {list(counts.shape)}, indices {list(indices.shape)}; batch {batch}, {heads} heads, {blocks} query blocks"
    if counts.dim() != 3 or counts.shape[0] not in (1, batch) or heads % counts.shape[1] or counts.shape[2] != blocks:
        raise EffError("EFF-K105", f"block lists of the wrong shape: {told}")
    if any(x.shape != counts.shape for x in (indices[..., 0], full_counts, full_indices[..., 0])):
        raise EffError("EFF-K105", f"block lists that do not fit each other: {told}")


def _limits(
    first: Tensor | None, last: Tensor | None, left: int, right: int, offset: int, rows: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Return (first key, last key) of each row, int32 `[B'', Q]`, with the band taken in; None where there are none."""
    if first is None and last is None:
        return None
    place = torch.arange(rows, dtype=torch.int32, device=device)[None] + offset
    low, high = torch.full_like(place, -(2**30)), torch.full_like(place, 2**30)
    low = torch.maximum(low if first is None else first, place - left if left >= 0 else low)
    high = torch.minimum(high if last is None else last, place + right if right >= 0 else high)
    low, high = torch.broadcast_tensors(low, high)
    return low.to(torch.int32).contiguous(), high.to(torch.int32).contiguous()
