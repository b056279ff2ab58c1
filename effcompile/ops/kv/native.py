"""Call the kernels of KV caches, `cpp/kv_attention.cpp` and `cpp/kv_append.cpp`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from effcompile.ops import native
from effcompile.ops.kv import common


def takes(*tensors: Tensor) -> bool:
    """Tell whether the compiled kernels run on these tensors: on CPU, in one dtype that they know."""
    return native.runs(native.CACHES, *tensors)


def append(
    bits: int,
    k: Tensor,
    v: Tensor,
    sizes: Sequence[int],
    state: Sequence[Tensor | None],
    places: Tensor | None = None,
) -> None:
    """Run `eff_kv_append`: sizes [length, packed, packed after, capacity, group, residual]; state in the order of use.

    With `places`, contiguous int64 `[B, Hkv]`, one token goes there.
    """
    k, v = native.dense_rows(k), native.dense_rows(v)
    batch, heads, count, depth = k.shape
    numbers = [bits, batch, heads, depth, v.shape[3], count, *sizes, torch.get_num_threads()]
    numbers += [*k.stride()[:3], *v.stride()[:3]]
    native.call(native.CACHES, "eff_kv_append", k.dtype, numbers, (k, v, *state, places))


def attend(
    bits: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sizes: Sequence[int],
    state: Sequence[Tensor | None],
    causal: bool,
    scale: float,
    softcap: float,
    scored: bool = False,
    theta: float = 0.0,
) -> common.Attended:
    """Run `eff_kv_attention`: sizes [length, packed, capacity, group, residual]; scores only where they are asked for.

    `theta` is for keys in two planes, whose peaks are the last two of `state`.
    """
    q, k, v = q.contiguous(), native.dense_rows(k), native.dense_rows(v)
    batch, heads, rows, depth = q.shape
    length, packed, capacity, group, residual = sizes
    width = v.shape[3]
    out = torch.empty((batch, heads, rows, width), dtype=q.dtype)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32)
    logits = torch.full((batch, heads, rows, capacity + k.shape[2]), -math.inf) if scored else None
    kind, strides = 0, (0, 0, 0, 0)
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask if kind == 1 or mask.dtype == torch.float32 else mask.float()
        a, b, c, d = mask.stride()
        strides = (a if mask.shape[0] > 1 else 0, b if mask.shape[1] > 1 else 0, c if mask.shape[2] > 1 else 0, d)
    numbers = [
        bits,
        batch,
        heads,
        k.shape[1],
        rows,
        depth,
        width,
        length,
        k.shape[2],
        packed,
        capacity,
        group,
        residual,
    ]
    numbers += [kind, causal, torch.get_num_threads(), *k.stride()[:3], *v.stride()[:3], *strides]
    operands = (q, k, v, mask, out, lse, logits, *state)
    native.call(native.CACHES, "eff_kv_attention", q.dtype, numbers, operands, scale, softcap, theta)
    return out, lse, logits
