"""Define `eff::attention_span_v1`: one query over the range of keys that it may read, which is known at run time only.

A cache of fixed size holds keys for tokens that are yet to come. Its mask drops them, but attention under the mask reads them all
the same. This op gets the range as numbers and gives torch's attention the keys inside it and no others. It is opaque to
TorchInductor: how much it reads is data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.ops.attention import define
from effcompile.ops.blocks import empty_rows, flash

NAME = "eff::attention_span_v1"


def attention_span(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    span: Tensor,
    empty_row: str,
    scale: float,
) -> Tensor:
    """Compute attention of one query over keys `first <= j <= last`, those of them that `mask` keeps.

    q `[B, Hq, 1, D]`, k `[B, Hkv, K, D]`, v `[B, Hkv, K, Dv]`, mask `[B|1, H|1, 1, K]` bool or None, sinks `[Hq]`; span `[2, B|1]`
    int64 holds the first and the last key, which may lie outside the tensor. A query without keys gives 0, or the mean of V where
    `empty_row` is "uniform", of which a sink leaves nothing. Returns `[B, Hq, 1, Dv]`.
    """
    first, last = span.tolist()
    ends = [(max(a, 0), min(b + 1, k.shape[2])) for a, b in zip(first, last)]
    if len(set(ends)) == 1:
        return _part(q, k, v, mask, sinks, ends[0], empty_row, scale)
    parts = []
    for number, one in enumerate(ends):
        mine = slice(number, number + 1)
        kept = mask if mask is None or mask.shape[0] == 1 else mask[mine]
        parts.append(_part(q[mine], k[mine], v[mine], kept, sinks, one, empty_row, scale))
    return torch.cat(parts)


def _part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    ends: tuple[int, int],
    empty_row: str,
    scale: float,
) -> Tensor:
    begin, end = ends
    group = q.shape[1] // k.shape[1]
    if begin >= end:
        return empty_rows(v, group, empty_row, sinks).expand(*q.shape[:3], v.shape[3]).contiguous()
    mask = None if mask is None else mask[..., begin:end]
    k, v_all, v = k[:, :, begin:end], v, v[:, :, begin:end]
    if sinks is None and (mask is None or mask.shape[1] == 1) and _together(q, k):
        rows = q.reshape(q.shape[0], k.shape[1], group, q.shape[3])
        out = flash(rows, k, v, mask, False, scale, None).reshape(*q.shape[:3], v.shape[3])
    else:
        out = flash(q, k, v, mask, False, scale, sinks)
    if mask is not None and empty_row in ("uniform", "nan"):
        gone = ~mask.any(-1, keepdim=True)
        if bool(gone.any()):
            out = torch.where(gone, empty_rows(v_all, group, empty_row, sinks), out)
    return out.contiguous()


def _together(q: Tensor, k: Tensor) -> bool:
    """Tell whether query heads that share keys are faster as rows of one head: each key is then read once for all of them.

    In half precision always: torch's kernel is slow with single rows. In float32 a row of several costs about two times a single
    one, so not where there are so many threads that the single ones run side by side.
    """
    if q.shape[1] == k.shape[1]:
        return False
    threads = torch.get_num_threads()
    single, shared = (-(-q.shape[0] * heads // threads) for heads in (q.shape[1], k.shape[1]))
    return q.dtype.itemsize == 2 or 2 * shared <= single


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def register() -> None:
    """Register the op, once."""
    define(
        NAME,
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, Tensor span, str empty_row, float scale) -> Tensor",
        attention_span,
        _fake,
    )
