"""Compute attention of one or a few new queries over the packed tokens of a KV cache, split among programs along the tokens.

As in `decode.py`, the rows of a program are the (query, head) pairs of one KV head, so a code is read and unpacked once for them,
and a second kernel merges the parts. Codes become numbers of the queries' dtype in registers. `kv_steps.py` has the ops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from effcompile.codegen.triton import decode, launch
from effcompile.codegen.triton.kernel import Config, Form, Kernel
from effcompile.codegen.triton.parts import capped, online_softmax, store_rows, widened

PANEL8, PANEL = 64, 32
FLOATS, PLANES, ROWS8, ROWS4 = 9, 12, 16, 17
"""As numbers of bits: 8 as floats (e4m3), 8 + 4 in two planes, and rows of 8 or 4 with a scale for each channel."""


@triton.jit
def packed(
    q, k_codes, v_codes, k_scales, v_scales, k_zeros, v_zeros, k_low, peak, mask, out, lse, most, count,
    q_batch, q_head, q_row, m_batch, m_head, m_row, kv_heads, rows, capacity, splits, scale, softcap, theta,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, VROW: tl.constexpr, GROUP: tl.constexpr,
    SPAN: tl.constexpr, BITS: tl.constexpr, LOWER: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Run one part of the packed tokens of one (sequence, KV head); `out` and `lse` are as those of `decode`.

    Of a cache in two planes, `most` gets the largest scores, in units of log2. A head whose `peak` is less than `theta` reads both
    planes where LOWER is 1 or 2; every other head reads the upper one, or where LOWER is 1 nothing.
    """
    part = tl.program_id(0) % splits
    owner = (tl.program_id(0) // splits).to(tl.int64)
    batch = owner // kv_heads
    head = owner % kv_heads
    place = tl.arange(0, BLOCK_M)
    row = place // GROUP
    own = place % GROUP
    live = place < rows * GROUP
    columns = tl.arange(0, BD)
    channels = tl.arange(0, BV)
    base = q + batch * q_batch + head * GROUP * q_head
    addresses = base + (row * q_row + own * q_head)[:, None] + columns[None, :]
    queries = tl.load(addresses, mask=live[:, None] & (columns < D)[None, :], other=0.0)

    tokens = tl.load(count).to(tl.int32)
    each = tl.cdiv(tl.cdiv(tokens, BLOCK_N), splits) * BLOCK_N
    lo = part * each
    hi = tl.minimum(lo + each, tokens)
    if BITS == 12:
        if LOWER > 0:
            whole = tl.where(tl.load(peak + owner) < theta, hi, lo)  # up to where both planes are read
        else:  # the upper plane stands for the middle of what the lower one may add
            middle = tl.sum(queries.to(tl.float32), 1) * 8.0
        if LOWER == 1:
            hi = whole
    if BITS >= 16:
        by_channel = tl.load(k_scales + head * D + columns, mask=columns < D, other=0.0)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BV], tl.float32)
    for start in tl.range(lo, hi, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        valid = slot < hi
        there = valid[None, :] & (columns < D)[:, None]
        if BITS >= 16:
            keys_of = k_codes + owner * capacity * D * (18 - BITS) // 2
            codes = row_codes(keys_of, slot[None, :], columns[:, None], there, D, BITS)
            keys = (codes * by_channel[:, None]).to(queries.dtype)
            scores = tl.dot(queries, keys, input_precision=PRECISION)
        elif BITS >= 8:
            panel = owner * capacity * D + (slot // 64) * (D * 64) + slot % 64
            codes = tl.load(k_codes + panel[None, :] + columns[:, None] * 64, mask=there, other=0)
            keys = widened(codes, BITS).to(queries.dtype)
            scores = tl.dot(queries, keys, input_precision=PRECISION)
            if BITS == 12:
                # Each plane is exact in any dtype of queries; their sum of 12 bits is not.
                if LOWER > 0:
                    panel = owner * (capacity * D // 2) + (slot // 64) * (D * 32) + slot % 64
                    # What is not read is 8: a branch around a product is more than some compilers take.
                    address = panel[None, :] + (columns // 2)[:, None] * 64
                    pairs = tl.load(k_low + address, mask=there & (slot < whole)[None, :], other=136)
                    nibbles = (pairs.to(tl.int32) >> ((columns % 2) * 4)[:, None]) & 15
                    lower = tl.dot(queries, nibbles.to(tl.float32).to(queries.dtype), input_precision=PRECISION)
                else:
                    lower = tl.broadcast_to(middle[:, None], (BLOCK_M, BLOCK_N))
                scores = scores * 16.0 + lower
            by = tl.load(k_scales + owner * capacity + slot, mask=valid, other=0.0).to(tl.float32)
            scores = scores * by[None, :]
        else:
            token = slot % 32
            if BITS == 4:
                panel = owner * (capacity * D // 2) + (slot // 32) * (D * 16) + token % 16
                address = panel[None, :] + columns[:, None] * 16
                shift = tl.broadcast_to(((token // 16) * 4)[None, :], (BD, BLOCK_N))
            else:
                panel = owner * (capacity * D // 4) + (slot // 32) * (D * 8) + token % 16
                address = panel[None, :] + (columns // 2)[:, None] * 16
                shift = ((token // 16) * 2)[None, :] + ((columns % 2) * 4)[:, None]
            codes = (tl.load(k_codes + address, mask=there, other=0).to(tl.int32) >> shift) & ((1 << BITS) - 1)
            line = (owner * (capacity // SPAN) + slot // SPAN) * D
            line = line[None, :] + columns[:, None]
            by = tl.load(k_scales + line, mask=there, other=0.0).to(tl.float32)
            zero = tl.load(k_zeros + line, mask=there, other=0.0).to(tl.float32)
            keys = (codes.to(tl.float32) * by + zero).to(queries.dtype)
            scores = tl.dot(queries, keys, input_precision=PRECISION)
        factor = 1.4426950408889634
        if HAS_SOFTCAP:
            scores = capped(scores, scale, softcap)
        else:
            factor = scale * 1.4426950408889634
        seen = tl.broadcast_to(valid[None, :], (BLOCK_M, BLOCK_N))
        if HAS_MASK:
            line = mask + batch * m_batch + (head * GROUP + own) * m_head + row * m_row
            seen = seen & (tl.load(line[:, None] + slot[None, :], mask=live[:, None] & valid[None, :], other=0) != 0)
        scores = tl.where(seen, scores, float("-inf"))
        weights, high, total, shrink = online_softmax(scores, factor, high, total)
        # What no row sees may be anything, and 0 * NaN is NaN.
        read = (tl.max(seen.to(tl.int32), 0) != 0) & valid
        there = read[:, None] & (channels < DV)[None, :]
        if BITS >= 16:
            values_of = v_codes + owner * capacity * DV * (18 - BITS) // 2
            values = row_codes(values_of, slot[:, None], channels[None, :], there, DV, BITS).to(queries.dtype)
        elif BITS >= 8:
            by = tl.load(v_scales + owner * capacity + slot, mask=read, other=0.0).to(tl.float32)
            weights = weights * by[None, :]
            rows_of = owner * capacity * VROW + slot * VROW
            codes = tl.load(v_codes + rows_of[:, None] + channels[None, :], mask=there, other=0)
            values = widened(codes, BITS).to(queries.dtype)
        else:
            if BITS == 4:
                rows_of = owner * (capacity * DV // 2) + slot * (DV // 2)
                shift = tl.broadcast_to(((channels % 32) // 16 * 4)[None, :], (BLOCK_N, BV))
            else:
                rows_of = owner * (capacity * DV // 4) + (slot // 2) * (DV // 2)
                shift = ((slot % 2) * 4)[:, None] + ((channels % 32) // 16 * 2)[None, :]
            address = rows_of[:, None] + (channels // 32 * 16 + channels % 16)[None, :]
            codes = (tl.load(v_codes + address, mask=there, other=0).to(tl.int32) >> shift) & ((1 << BITS) - 1)
            line = (owner * (DV // SPAN) * capacity + slot)[:, None] + (channels // SPAN * capacity)[None, :]
            by = tl.load(v_scales + line, mask=there, other=0.0).to(tl.float32)
            zero = tl.load(v_zeros + line, mask=there, other=0.0).to(tl.float32)
            values = (codes.to(tl.float32) * by + zero).to(queries.dtype)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)

    if BITS >= 16:
        acc = acc * tl.load(v_scales + head * DV + channels, mask=channels < DV, other=0.0)[None, :]
    divisor = tl.where(total == 0.0, 1.0, total)
    where = (owner * rows * GROUP + place) * splits + part
    tl.store(lse + where, tl.where(total == 0.0, float("-inf"), high + tl.log2(divisor)), mask=live)
    if BITS == 12:
        tl.store(most + where, high, mask=live)
    store_rows(out, where, live, acc / divisor[:, None], DV, 0)


@triton.jit
def row_codes(base, slot, channel, there, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Return codes of rows of WIDTH channels as floats: 8 bits (16), or 4 of which the even channel is the low half (17)."""
    if BITS == 16:
        return tl.load(base + slot * WIDTH + channel, mask=there, other=0).to(tl.float32)
    pairs = tl.load(base + slot * (WIDTH // 2) + channel // 2, mask=there, other=0).to(tl.int32)
    return (((pairs >> (channel % 2 * 4)) & 15) - 8).to(tl.float32)


def form(
    dtype: str,
    arch: str,
    width: int,
    value_width: int,
    bits: int,
    *,
    group: int = 4,
    rows: int = 1,
    span: int = 32,
    planes: int = 0,
    masked: bool = True,
    capped: bool = False,
) -> Form:
    """Return the form for `group` query heads a KV head and `rows` queries a sequence.

    `span` is the group of a grouped cache, `planes` says who reads the lower plane of one in two planes.
    """
    codes = "*i8" if bits in (8, PLANES, ROWS8) else "*u8"
    types = (
        ("q", f"*{dtype}"),
        ("k_codes v_codes", codes),
        ("k_scales v_scales k_zeros v_zeros", "*fp32" if bits in (ROWS8, ROWS4) else "*fp16"),
        ("k_low", "*u8"),
        ("peak", "*fp32"),
        ("mask", "*u8"),
        ("out lse most", "*fp32"),
        ("count", "*i64"),
        ("q_batch q_head q_row m_batch m_head m_row kv_heads rows capacity splits", "i32"),
        ("scale softcap theta", "fp32"),
    )
    sizes = {
        "D": width,
        "DV": value_width,
        "BD": max(16, launch.power(width)),
        "BV": max(16, launch.power(value_width)),
    }
    sizes |= {"VROW": -(-value_width // 16) * 16, "GROUP": group, "SPAN": span, "BITS": bits, "LOWER": planes}
    sizes |= {"BLOCK_M": 1 << max(4, (group * rows - 1).bit_length())}
    flags = {"HAS_MASK": masked, "HAS_SOFTCAP": capped}
    told = [word for word, said in zip(("mask", "cap"), flags.values()) if said]
    words = {8: "int8", FLOATS: "fp8", PLANES: f"planes{planes}", ROWS8: "rows8", ROWS4: "rows4"}
    what = words.get(bits) or f"int{bits}.{span}"
    shape = f"d{width}" if width == value_width else f"d{width}.{value_width}"
    return Form(
        "-".join((dtype, what, shape, f"g{group}", *((f"q{rows}",) if rows > 1 else ()), *told)),
        launch.typed(types),
        launch.fixed(sizes, flags, PRECISION=launch.precision(dtype, arch)),
        ("q", "k_codes", "v_codes", "out", "lse", "capacity"),
    )


def forms(arch: str) -> tuple[Form, ...]:
    """Return the forms that are compiled in tests."""
    return (
        form("bf16", arch, 128, 128, 8),
        form("bf16", arch, 128, 128, FLOATS),
        form("bf16", arch, 128, 128, 4),
        form("fp16", arch, 64, 64, 2, group=8, rows=2, masked=False),
        form("bf16", arch, 128, 128, ROWS8),
        form("fp16", arch, 64, 64, ROWS4, group=8, rows=2, masked=False),
        form("bf16", arch, 128, 128, PLANES),
        form("bf16", arch, 128, 128, PLANES, planes=1),
        form("bf16", arch, 128, 128, PLANES, planes=2),
    )


def configs(shape: Form, arch: str) -> tuple[Config, ...]:
    """Return the configs for a form, the default first. A tile is whole panels."""
    bits = int(dict(shape.constants)["BITS"] or 0)
    n = PANEL8 if bits >= 8 else PANEL
    if arch == launch.SMALL:
        return (Config((("BLOCK_N", n),), 1, 1),)
    stages = (3, 2, 4) if not arch.startswith("gfx") else (1, 2)
    # Codes and what they become are wide: with 4 warps 128 channels spill.
    warps = 8 if int(dict(shape.constants)["BD"] or 0) >= 128 and arch.startswith("sm_") else 4
    return tuple(Config((("BLOCK_N", n),), warps, count) for count in stages)


KERNELS = (Kernel("kv_packed", packed, forms, configs),)


@dataclass(frozen=True)
class Packed:
    """Hold the packed tokens of a cache: codes and scales of keys and values, and the zeros that a grouped one has.

    `span` is the group of a grouped cache, `low` the lower plane of one in two planes.
    """

    bits: int
    capacity: int
    k_codes: Tensor
    v_codes: Tensor
    k_scales: Tensor
    v_scales: Tensor
    zeros: tuple[Tensor, Tensor] | None = None
    span: int = PANEL
    low: Tensor | None = None


def over(
    q: Tensor,
    value_width: int,
    state: Packed,
    count: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    splits: int,
    *,
    planes: int = 0,
    peak: Tensor | None = None,
    theta: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return attention over the first `count` packed tokens, float32 `[B, Hq, Q, Dv]`, its LSE and, of two planes, largest scores.

    Raises:
        EffError: EFF-K101 for the chip.
    """
    q, scale = launch.positive(launch.dense_rows(q), scale)
    batch, heads, rows, width = q.shape
    kv_heads, bits = state.k_codes.shape[1], state.bits
    group = heads // kv_heads
    arch = launch.architecture_of(q)
    flags = {"masked": mask is not None, "capped": softcap != 0.0}
    sizes = {"group": group, "rows": rows, "span": state.span, "planes": planes}
    shape = form(launch.word(q), arch, width, value_width, bits, **sizes, **flags)  # type: ignore[arg-type]
    config = configs(shape, arch)[0]
    out = q.new_empty((batch, heads, rows, value_width), dtype=torch.float32)
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
    two = bits == PLANES
    if out.numel() == 0:
        return out, lse, lse if two else None
    splits = splits or launch.splits(batch * kv_heads, launch.cdiv(state.capacity, config.constants["BLOCK_N"]), q)
    parts = q.new_empty((batch, kv_heads, rows * group, splits, value_width), dtype=torch.float32)
    part_lse = q.new_empty(parts.shape[:4], dtype=torch.float32)
    most = torch.empty_like(part_lse) if two else part_lse
    strides = (0, 0, 0)
    told = q
    if mask is not None:
        told = launch.dense_rows(mask).view(torch.uint8)
        strides = tuple(told.stride(d) if told.shape[d] > 1 else 0 for d in range(3))  # type: ignore[assignment]
    where = count.reshape(1).to(torch.int64)
    scales = (state.k_scales, state.v_scales)
    low, last_peak = state.k_codes if state.low is None else state.low, part_lse if peak is None else peak
    runtime = (
        *(
            q,
            state.k_codes,
            state.v_codes,
            *scales,
            *(state.zeros or scales),
            low,
            last_peak,
            told,
            parts,
            part_lse,
            most,
        ),
        *(where, q.stride(0), q.stride(1), q.stride(2), *strides),
        *(kv_heads, rows, state.capacity, splits, scale, softcap, theta),
    )
    launch.run(KERNELS[0], (batch * kv_heads * splits,), runtime, shape, config, False)
    last = decode.merge_form(value_width, group, splits)
    merged = (parts, part_lse, out, lse, kv_heads, rows, splits)
    launch.run(decode.KERNELS[1], (batch * heads * rows,), merged, last, decode.merge_configs(last, arch)[0], False)
    if not two:
        return out, lse, None
    # Rows of a KV head lie as (query, head), scores as (head, query), in natural units.
    largest = most.amax(-1).unflatten(2, (rows, group)).transpose(2, 3).flatten(1, 2) * math.log(2.0)
    return out, lse, largest
