"""Compute attention of one or a few new queries over the packed tokens of a KV cache, split among programs along the tokens.

As in `decode.py`, the rows of a program are the (query, head) pairs of one KV head, so a code is read and unpacked once for them,
and a second kernel merges the parts. Codes become numbers of the queries' dtype in registers. What is not packed, the tokens of the
call and the last ones of `kivi`, are few: plain operations attend over them, and both results are merged by their LSE.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effcompile.codegen.triton import decode, launch
from effcompile.codegen.triton.kernel import WORDS, Config, Form, Kernel
from effcompile.codegen.triton.parts import capped, online_softmax, store_rows
from effcompile.ops import flash
from effcompile.ops.kv import common, grouped, per_token

PANEL8, PANEL = 64, 32
FLOATS = 9
"""As a number of bits: 8, as floats (e4m3)."""


@triton.jit
def packed(
    q, k_codes, v_codes, k_scales, v_scales, k_zeros, v_zeros, mask, out, lse, count,
    q_batch, q_head, q_row, m_batch, m_head, m_row, kv_heads, rows, capacity, splits, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, VROW: tl.constexpr, GROUP: tl.constexpr,
    SPAN: tl.constexpr, BITS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Run one part of the packed tokens of one (sequence, KV head); `out` and `lse` are as those of `decode`."""
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
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BV], tl.float32)
    for start in tl.range(lo, hi, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        valid = slot < hi
        there = valid[None, :] & (columns < D)[:, None]
        if BITS >= 8:
            panel = owner * capacity * D + (slot // 64) * (D * 64) + slot % 64
            codes = tl.load(k_codes + panel[None, :] + columns[:, None] * 64, mask=there, other=0)
            keys = widened(codes, BITS).to(queries.dtype)
            by = tl.load(k_scales + owner * capacity + slot, mask=valid, other=0.0).to(tl.float32)
            scores = tl.dot(queries, keys, input_precision=PRECISION) * by[None, :]
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
        if BITS >= 8:
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

    divisor = tl.where(total == 0.0, 1.0, total)
    where = (owner * rows * GROUP + place) * splits + part
    tl.store(lse + where, tl.where(total == 0.0, float("-inf"), high + tl.log2(divisor)), mask=live)
    store_rows(out, where, live, acc / divisor[:, None], DV, 0)


@triton.jit
def widened(codes, BITS: tl.constexpr):
    """Return 8-bit codes as floats."""
    if BITS == 9:
        # A float of 8 bits is the upper part of a half, but for a factor of 256.
        bits = ((codes.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -16512).to(tl.int16)
        return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return codes.to(tl.float32)


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
    masked: bool = True,
    capped: bool = False,
) -> Form:
    """Return the form for `group` query heads a KV head and `rows` queries a sequence; `span` is the group of a grouped cache."""
    codes = "*i8" if bits == 8 else "*u8"
    types = (
        ("q", f"*{dtype}"),
        ("k_codes v_codes", codes),
        ("k_scales v_scales k_zeros v_zeros", "*fp16"),
        ("mask", "*u8"),
        ("out lse", "*fp32"),
        ("count", "*i64"),
        ("q_batch q_head q_row m_batch m_head m_row kv_heads rows capacity splits", "i32"),
        ("scale softcap", "fp32"),
    )
    sizes = {
        "D": width,
        "DV": value_width,
        "BD": max(16, launch.power(width)),
        "BV": max(16, launch.power(value_width)),
    }
    sizes |= {"VROW": -(-value_width // 16) * 16, "GROUP": group, "SPAN": span, "BITS": bits}
    sizes |= {"BLOCK_M": 1 << max(4, (group * rows - 1).bit_length())}
    flags = {"HAS_MASK": masked, "HAS_SOFTCAP": capped}
    told = [word for word, said in zip(("mask", "cap"), flags.values()) if said]
    what = {8: "int8", FLOATS: "fp8", 4: f"int4.{span}", 2: f"int2.{span}"}[bits]
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


def attend_token8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_codes: Tensor,
    v_codes: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    length: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    window: int = 0,
    format: str = "",
    *,
    splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run `eff::kv_attention_token8_v1` (see effcompile/ops/kv/per_token.py) with the kernels where they take it."""
    if not _takes(q, k, v, mask):
        whole = (q, k, v, k_codes, v_codes, k_scales, v_scales, length, mask, causal, scale, softcap)
        return per_token.attend(*whole, scored=False)[:2]
    bits = FLOATS if k_codes.dtype == torch.uint8 else 8
    state = (k_codes, v_codes, k_scales, v_scales, k_scales, v_scales)
    rest = common.attention(q, (k[:, :, :0], v[:, :, :0]), k, v, length, mask, causal, scale, softcap)
    old = _over(q, v.shape[3], state, length - k.shape[2], k_scales.shape[2], mask, scale, softcap, bits, PANEL, splits)
    return _merged(q, old, rest)


def attend_grouped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_codes: Tensor,
    v_codes: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    k_zeros: Tensor,
    v_zeros: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    length: Tensor,
    packed: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    bits: int,
    window: int = 0,
    format: str = "",
    *,
    splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run `eff::kv_attention_grouped_v1` (see effcompile/ops/kv/grouped.py) with the kernels where they take it."""
    state = (k_codes, v_codes, k_scales, v_scales, k_zeros, v_zeros)
    if not _takes(q, k, v, mask):
        rest_of: tuple[Any, ...] = (k_recent, v_recent, length, packed, mask, causal, scale, softcap, bits)
        return grouped.attend(q, k, v, *state, *rest_of, scored=False)[:2]
    before = length - k.shape[2]
    done, capacity = torch.minimum(packed, before), v_scales.shape[3]
    span = v_recent.shape[3] // v_scales.shape[2]
    # Slot s of the unpacked tokens holds the token from there on that is s modulo their number; put in order, they are a cache.
    slots = (done + torch.arange(k_recent.shape[2], device=q.device)) % k_recent.shape[2]
    recent = (k_recent.index_select(2, slots), v_recent.index_select(2, slots))
    own = None
    if mask is not None:
        columns = done + torch.arange(k_recent.shape[2] + k.shape[2], device=q.device)
        own = mask.index_select(3, columns.clamp(max=mask.shape[3] - 1))
    rest = common.attention(q, recent, k, v, length - done, own, causal, scale, softcap)
    old = _over(q, v.shape[3], state, done, capacity, mask, scale, softcap, bits, span, splits)
    return _merged(q, old, rest)


def _takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Tell whether the kernel runs a call: a few queries, a mask of bool, and dimensions and dtypes that it knows."""
    rows, widest = q.shape[2] * (q.shape[1] // k.shape[1]), max(q.shape[3], v.shape[3])
    known = str(q.dtype).removeprefix("torch.") in WORDS and k.dtype == q.dtype
    return rows <= 128 and widest <= launch.WIDEST and known and (mask is None or mask.dtype == torch.bool)


def _merged(q: Tensor, old: tuple[Tensor, Tensor], rest: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    out, lse = flash.merge(old, (rest[0].float(), rest[1].float()))
    return out.to(q.dtype), lse


def _over(
    q: Tensor,
    value_width: int,
    state: tuple[Tensor, ...],
    count: Tensor,
    capacity: int,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    bits: int,
    span: int,
    splits: int,
) -> tuple[Tensor, Tensor]:
    """Return attention over the first `count` tokens of packed ones, float32 `[B, Hq, Q, Dv]`, and its LSE.

    Raises:
        EffError: EFF-K101 for the chip.
    """
    q, scale = launch.positive(launch.dense_rows(q), scale)
    batch, heads, rows, width = q.shape
    kv_heads = state[0].shape[1]
    group = heads // kv_heads
    arch = launch.architecture_of(q)
    flags = {"masked": mask is not None, "capped": softcap != 0.0}
    shape = form(launch.word(q), arch, width, value_width, bits, group=group, rows=rows, span=span, **flags)
    config = configs(shape, arch)[0]
    out = q.new_empty((batch, heads, rows, value_width), dtype=torch.float32)
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    splits = splits or launch.splits(batch * kv_heads, launch.cdiv(capacity, config.constants["BLOCK_N"]), q)
    parts = q.new_empty((batch, kv_heads, rows * group, splits, value_width), dtype=torch.float32)
    part_lse = q.new_empty(parts.shape[:4], dtype=torch.float32)
    strides = (0, 0, 0)
    told = q
    if mask is not None:
        told = launch.dense_rows(mask).view(torch.uint8)
        strides = tuple(told.stride(d) if told.shape[d] > 1 else 0 for d in range(3))  # type: ignore[assignment]
    where = count.reshape(1).to(torch.int64)
    runtime = (
        *(q, *state, told, parts, part_lse, where, q.stride(0), q.stride(1), q.stride(2), *strides),
        *(kv_heads, rows, capacity, splits, scale, softcap),
    )
    launch.run(KERNELS[0], (batch * kv_heads * splits,), runtime, shape, config, False)
    last = decode.merge_form(value_width, group, splits)
    merged = (parts, part_lse, out, lse, kv_heads, rows, splits)
    launch.run(decode.KERNELS[1], (batch * heads * rows,), merged, last, decode.merge_configs(last, arch)[0], False)
    return out, lse
