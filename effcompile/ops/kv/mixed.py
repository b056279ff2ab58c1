"""Keep tokens in two numbers of bits by how much they are read, and the last ones as they are (ZipVL, arXiv:2410.08584).

A layer has two packed parts, `a_*` and `b_*`, in the form of `grouped.py`, each with `*_positions` int32 `[B, Hkv, C]`: which token
of the context lies at a place. The last tokens lie in `k_recent` and `v_recent` in the order of the context, `length` of them;
`mass` float32 `[B, Hkv, R]` is what queries have read of each. When they get too many, groups of the oldest leave: those that were
read most by each query that saw them go to the first part, so that it holds `share` of what is packed, the others to the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effcompile.ops import flash
from effcompile.ops.attention import define
from effcompile.ops.kv import common, grouped, plain, scores

NAMES = (*grouped.NAMES, "length", "packed")
PARTS = ("a_", "b_")
PACKED = tuple(part + name for part in PARTS for name in (*NAMES, "positions"))
RECENT = ("k_recent", "v_recent", "length", "seen")
MIX, ATTENTION = "eff::kv_mix_v1", "eff::kv_attention_mixed_v1"
_EACH = len(NAMES) + 1
_GROUPED: Callable[..., common.Attended] = grouped.attend


def divide(
    parts: Sequence[Sequence[Tensor]], k: Tensor, v: Tensor, rank: Tensor, many: int, first: int, bits: Sequence[int]
) -> None:
    """Pack tokens k, v `[B, Hkv, N, D]`, which are `first` and on in the context: the `many` of largest `rank` into the first part.

    Raises:
        EffError: EFF-K201 where a part has no place; nothing is written then.
    """
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    chosen = [order[..., :many].sort(-1).values, order[..., many:].sort(-1).values]
    for part, places in zip(parts, chosen):
        common.check_room(int(part[-3]), places.shape[-1], part[-1].shape[2])
    pack: Callable[..., None] = grouped.append
    for part, places, number in zip(parts, chosen, bits):
        count, held = places.shape[-1], int(part[-3])
        if count:
            keys, values = (x.gather(2, places[..., None].expand(-1, -1, -1, x.shape[3])) for x in (k, v))
            pack(*part[:-1], keys, values, number)
            part[-3].add_(count)
            part[-1][:, :, held : held + count] = places + first


def quota(share: float, done: int, held: int, count: int, group: int) -> int:
    """Return how many of `count` tokens go to the first part, whole groups, when `held` of the `done` before them did."""
    return min(count, max(0, round((share * (done + count) - held) / group) * group))


def mix(*given: Any) -> Tensor:
    """Append tokens k `[B, Hkv, S, D]`, v, of which `gain` `[B, Hkv, R + S]` was read; return how many are not packed, int64 `[]`.

    Operands: both parts, k_recent, v_recent, mass, length, seen, share, k, v, gain, then residual, interval, bits of both parts,
    and the tokens that a context may have, 0 for any.

    Raises:
        EffError: EFF-K201 without place, EFF-K202 for another shape; nothing is written then.
    """
    parts, rest = (given[:_EACH], given[_EACH : 2 * _EACH]), given[2 * _EACH :]
    k_recent, v_recent, mass, length, seen, share, k, v, gain, residual, interval, high, low, context = rest
    batch, heads, room, depth = k_recent.shape
    common.check_shapes((batch, heads, depth, v_recent.shape[3]), k, v, k_recent.dtype)
    held, fresh, group = int(length), k.shape[2], v_recent.shape[3] // parts[0][3].shape[2]
    total, before = held + fresh, int(seen)
    if context:
        common.check_room(before, fresh, context)
    read = torch.cat([mass[:, :, :held] + gain[:, :, :held], gain[:, :, room:]], 2)
    if total < residual + interval:
        k_recent[:, :, held:total], v_recent[:, :, held:total], mass[:, :, :total] = k, v, read
        return length + fresh
    count, first = (total - residual) // group * group, before - held
    keys, values = torch.cat([k_recent[:, :, :held], k], 2), torch.cat([v_recent[:, :, :held], v], 2)
    saw = torch.arange(total, total - count, -1, device=k.device)  # how many queries could read the token
    many = quota(float(share), first, int(parts[0][-3]), count, group)
    divide(parts, keys[:, :, :count], values[:, :, :count], read[:, :, :count] / saw, many, first, (high, low))
    left = total - count
    k_recent[:, :, :left], v_recent[:, :, :left], mass[:, :, :left] = (
        keys[:, :, count:],
        values[:, :, count:],
        read[:, :, count:],
    )
    return torch.full_like(length, left)


def attend(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute attention as `Storage.attend` says, over both parts, the recent tokens and those of the call.

    Operands: q, k, v, both parts, k_recent, v_recent, length, seen (both before the call), mask, causal, scale, softcap, bits of
    both parts, window, format. The third result is what the queries read, `[B, Hkv, R + S]` as in `mix`.
    """
    q, k, v, parts, rest = operands(given)
    k_recent, v_recent, length, seen, mask, causal, scale, softcap, high, low = rest[:10]
    recent, fresh, total = int(length), k.shape[2], int(seen)
    common.check_mask(mask, q, total + fresh, causal, fresh)
    none = k[:, :, :0]
    found = []
    for part, bits in zip(parts, (high, low)):
        count = int(part[-3])
        if count:
            own = of_places(mask, part[-1][:, :, :count], q)
            found.append(_over(part, bits, q, none, v[:, :, :0], own, scale, softcap))
    last = None if mask is None else mask[..., total - recent : total + fresh]
    state = (k_recent, v_recent, length + fresh)
    out, lse, logits = plain.attend(q, k, v, *state, last, causal, scale, softcap, scored=True)
    assert logits is not None
    for other in found:
        out, lse = flash.merge((out.float(), lse), (other[0].float(), other[1]))
    return out.to(q.dtype), lse, scores.gained(logits, lse, k.shape[1])


def operands(given: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor, tuple[Sequence[Any], Sequence[Any]], Sequence[Any]]:
    """Return q, k, v, both parts and the rest of the operands of an attention."""
    return (*given[:3], (given[3 : 3 + _EACH], given[3 + _EACH : 3 + 2 * _EACH]), given[3 + 2 * _EACH :])  # type: ignore[return-value]


def _over(
    part: Sequence[Tensor],
    bits: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attend over a packed part, a few queries at a time: they are one call of the compiled kernel."""
    found, over = [], _GROUPED
    for first in range(0, q.shape[2], common.FEW):
        rows = slice(first, first + common.FEW)
        own = None if mask is None else mask[:, :, rows]
        out, lse, _ = over(q[:, :, rows], k, v, *part[:-1], own, False, scale, softcap, bits, scored=False)
        found.append((out, lse))
    return torch.cat([out for out, _ in found], 2), torch.cat([lse for _, lse in found], 2)


def of_places(mask: Tensor | None, positions: Tensor, q: Tensor) -> Tensor | None:
    """Return the columns of a mask that belong to the tokens at some places, `[B, Hq, Q, C]`."""
    if mask is None:
        return None
    places = scores.by_query_head(positions.long(), q.shape[1])[:, :, None].expand(-1, -1, mask.shape[2], -1)
    return mask.expand(q.shape[0], q.shape[1], -1, -1).gather(3, places).expand(-1, -1, q.shape[2], -1)


def _fake(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = given[:3]
    recent = given[3 + 2 * _EACH]
    gain = k.new_empty((k.shape[0], k.shape[1], recent.shape[2] + k.shape[2]), dtype=torch.float32)
    return (*flash.fake_pair(q, k, v), gain)


def _fake_mix(*given: Any) -> Tensor:
    length: Tensor = given[2 * _EACH + 3]
    return torch.empty_like(length)


def register() -> None:
    """Register the ops, once."""
    written = (*PACKED, "k_recent", "v_recent", "mass")
    tensors = ", ".join(f"Tensor({chr(ord('a') + n)}!) {name}" for n, name in enumerate(written))
    more = "Tensor length, Tensor seen, Tensor share, Tensor k, Tensor v, Tensor gain"
    more += ", int residual, int interval, int high, int low, int context"
    define(MIX, f"({tensors}, {more}) -> Tensor", mix, _fake_mix)
    read = ", ".join(f"Tensor {name}" for name in ("q", "k", "v", *PACKED, *RECENT))
    asked = "Tensor? mask, bool causal, float scale, float softcap, int high, int low, int window, str format"
    define(ATTENTION, f"({read}, {asked}) -> (Tensor, Tensor, Tensor)", attend, _fake)
