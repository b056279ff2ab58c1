"""Hold the device functions that several kernels are made of.

Every exponential is `exp2`: log2(e) is part of the factor that scales the scores.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def online_softmax(scores, factor, high, total):
    """Take a tile of scores `[M, N]` into a running softmax; return (weights, new maximum, new sum, what the old sum shrinks by).

    `factor` > 0 takes the scores to units of log2; it is multiplied in where it costs nothing. A row that has met no key yet
    has the maximum -inf and is compared with 0 instead, so that no inf - inf appears.
    """
    new = tl.maximum(high, tl.max(scores, 1) * factor)
    safe = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores * factor - safe[:, None])
    shrink = tl.exp2(high - safe)
    return weights, new, total * shrink + tl.sum(weights, 1), shrink


@triton.jit
def capped(products, scale, softcap):
    """Return softcap * tanh(products * scale / softcap)."""
    # tanh(x) = 1 - 2 / (exp(2x) + 1): both ends saturate, nothing overflows to NaN.
    grown = tl.exp2(products * (scale * 2.0 * 1.4426950408889634 / softcap))
    return (1.0 - 2.0 / (grown + 1.0)) * softcap


@triton.jit
def kept(low, top, keys, valid, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Return the mask `[M, N]`: keys that are valid and, where these sides are bounded, low <= key <= top of the row."""
    keep = tl.broadcast_to(valid[None, :], (low.shape[0], keys.shape[0]))
    if HAS_LEFT:
        keep = keep & (keys[None, :] >= low[:, None])
    if HAS_RIGHT:
        keep = keep & (keys[None, :] <= top[:, None])
    return keep


@triton.jit
def load_rows(base, stride, places, valid, columns, WIDTH: tl.constexpr, FROM: tl.constexpr, MASKED: tl.constexpr):
    """Load rows `places` `[N]` and columns FROM + `columns` `[D]` of a matrix; what is not `valid` or beyond WIDTH reads 0."""
    addresses = base + places[:, None] * stride + (FROM + columns)[None, :]
    if FROM + columns.shape[0] > WIDTH:
        inside = (FROM + columns)[None, :] < WIDTH
        if MASKED:
            return tl.load(addresses, mask=valid[:, None] & inside, other=0.0)
        return tl.load(addresses, mask=inside, other=0.0)
    if MASKED:
        return tl.load(addresses, mask=valid[:, None], other=0.0)
    return tl.load(addresses)


@triton.jit
def take_tile(
    acc0, acc1, high, total, q0, q1, k, v, batch, kv_head, start, low, top, first, last, key_mask, scale, softcap,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, BOUNDED: tl.constexpr, BANDED: tl.constexpr,
    HAS_KEYS: tl.constexpr,
):  # fmt: skip
    """Take BLOCK_N keys from `start` on into the running softmax (high, total) and the weighted sum of values (acc0 | acc1).

    q0 `[M, D0]` and q1 `[M, D1]` hold queries that see the keys low <= key <= top. With BOUNDED only keys of [first, last)
    count and are read; with BANDED low and top count as well and, with HAS_KEYS, the bytes at `key_mask`. k and v point to
    the head's first row, or are TMA descriptors of the whole tensors.
    """
    places = tl.arange(0, BLOCK_N)
    keys = start + places
    valid = (keys >= first) & (keys < last)
    if HAS_KEYS and BANDED:
        valid = valid & (tl.load(key_mask + keys, mask=valid, other=0) != 0)
    k_tile, v_tile = k, v
    if TMA:
        scores = tl.dot(
            q0, tl.trans(k.load([batch, kv_head, start, 0]).reshape([BLOCK_N, D0])), input_precision=PRECISION
        )
    else:
        # 64-bit: row strides times lengths leave 32 bits at a million tokens.
        k_tile = k + tl.cast(start, tl.int64) * K_ROW
        v_tile = v + tl.cast(start, tl.int64) * V_ROW
        columns = tl.arange(0, D0)
        scores = tl.dot(
            q0, tl.trans(load_rows(k_tile, K_ROW, places, valid, columns, D, 0, BOUNDED)), input_precision=PRECISION
        )
    if D1 > 0:
        more = load_rows(k_tile, K_ROW, places, valid, tl.arange(0, D1), D, D0, BOUNDED)
        scores = tl.dot(q1, tl.trans(more), scores, input_precision=PRECISION)
    factor = 1.4426950408889634
    if HAS_SOFTCAP:
        scores = capped(scores, scale, softcap)
    else:
        factor = scale * 1.4426950408889634
    if BANDED:
        scores = tl.where(kept(low, top, keys, valid, HAS_LEFT, HAS_RIGHT), scores, float("-inf"))
    elif BOUNDED:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    weights, high, total, shrink = online_softmax(scores, factor, high, total)
    if TMA:
        values = v.load([batch, kv_head, start, 0]).reshape([BLOCK_N, V0])
        if BOUNDED:
            # What is padded may be anything, and 0 * NaN is NaN.
            values = tl.where(valid[:, None], values, 0.0)
    else:
        values = load_rows(v_tile, V_ROW, places, valid, tl.arange(0, V0), DV, 0, BOUNDED)
    weights = weights.to(values.dtype)
    acc0 = tl.dot(weights, values, acc0 * shrink[:, None], input_precision=PRECISION)
    if V1 > 0:
        more = load_rows(v_tile, V_ROW, places, valid, tl.arange(0, V1), DV, V0, BOUNDED)
        acc1 = tl.dot(weights, more, acc1 * shrink[:, None], input_precision=PRECISION)
    return acc0, acc1, high, total


@triton.jit
def load_queries(base, addresses, live, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    """Load WIDTH columns from FROM on of the query rows at `addresses`; dead rows and columns beyond D read 0."""
    columns = FROM + tl.arange(0, WIDTH)
    return tl.load(base + addresses[:, None] + columns[None, :], mask=live[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, live, values, WIDTH: tl.constexpr, FROM: tl.constexpr):
    """Store values `[M, N]` to columns FROM ... of rows WIDTH apart, in the type of `base`."""
    columns = FROM + tl.arange(0, values.shape[1])
    mask = live[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None] * WIDTH + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def logsumexp(high, total):
    """Return the natural LSE of a running softmax, -inf for a row without keys."""
    return tl.where(
        total == 0.0, float("-inf"), (high + tl.log2(tl.where(total == 0.0, 1.0, total))) * 0.6931471805599453
    )


@triton.jit
def widened(codes, BITS: tl.constexpr):
    """Return 8-bit codes as floats: whole numbers where BITS is 8, floats of 8 bits (e4m3, no NaN) where it is 9."""
    if BITS == 9:
        # A float of 8 bits is the upper part of a half, but for a factor of 256.
        bits = ((codes.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -16512).to(tl.int16)
        return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return codes.to(tl.float32)
