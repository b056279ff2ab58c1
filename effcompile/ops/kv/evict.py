"""Keep account of the tokens of a cache that drops some: where each stood, what it has gathered, and which goes next.

`positions` int32 `[B, Hkv, C]` says of each place of a state which token of the context lies there, `seen` int64 `[]` how many
there have been, `mass` float32 `[B, Hkv, C]` what a policy has summed for it (without places where it sums nothing), `start` int64
`[B]` which token is the first that is no padding, `budget` int64 `[]` how many tokens stay.

The token that goes is the one of least mass, or the oldest where nothing is summed; padding goes first, and the first `sinks`
tokens and the last `recent` share of the budget never. No op counts `seen`: rotations read it, and what compiled code computes
late from a number that an op has written would be wrong. Where tokens lie in groups that share scales, the group with the least
mean goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.ops.attention import define
from effcompile.ops.kv import common, grouped

TRACK, PLACE, DROP = "eff::kv_track_v1", "eff::kv_place_v1", "eff::kv_drop_grouped_v1"


def track(
    positions: Tensor, mass: Tensor, seen: Tensor, length: Tensor, gain: Tensor | None, count: int, context: int
) -> None:
    """Note `count` tokens that are about to be appended behind the `length` held ones; add `gain` `[B, Hkv, C + count]` to mass.

    A context of no more than `context` tokens is what the caller can mask, 0 for any.

    Raises:
        EffError: EFF-K201 without place; nothing is written then.
    """
    held, total, capacity = int(length), int(seen), positions.shape[2]
    check_context(total, count, context)
    common.check_room(held, count, capacity)
    positions[:, :, held : held + count] = torch.arange(total, total + count, device=positions.device)
    if gain is not None:
        mass[:, :, :held] += gain[:, :, :held]
        mass[:, :, held : held + count] = gain[:, :, capacity:]


def place(
    positions: Tensor,
    mass: Tensor,
    seen: Tensor,
    length: Tensor,
    budget: Tensor,
    start: Tensor,
    gain: Tensor | None,
    sinks: int,
    recent: float,
    context: int,
) -> Tensor:
    """Return where the next token goes, int64 `[B, Hkv]`: behind the others, or over the one that is dropped, and note it there.

    Raises:
        EffError: EFF-K201 without place; nothing is written then.
    """
    held, total, limit = int(length), int(seen), int(budget)
    batch, heads, capacity = positions.shape
    check_context(total, 1, context)
    if held < limit:
        common.check_room(held, 1, capacity)
    if gain is not None:
        mass[:, :, :held] += gain[:, :, :held]
    if held < limit:
        places = torch.full((batch, heads), held, dtype=torch.int64, device=positions.device)
    else:
        places = _rank(positions, mass, start, held, total + 1, limit, sinks, recent).argmin(-1)
    at = places[:, :, None]
    positions.scatter_(2, at, total)
    if gain is not None:
        mass.scatter_(2, at, gain[:, :, capacity:])
    return places


def check_context(seen: int, count: int, context: int) -> None:
    """Raise EFF-K201 where `count` more tokens would be more than a context of `context` tokens, which is any where it is 0."""
    if context and seen + count > context:
        raise EffError(
            "EFF-K201",
            f"the cache has seen {seen} of the {context} tokens that it was made for, and {count} more arrive; nothing was written",
            hint=f"capacity={seen + count} or more: it counts the tokens of the context, also those that are dropped",
        )


def _rank(
    positions: Tensor, mass: Tensor, start: Tensor, held: int, total: int, limit: int, sinks: int, recent: float
) -> Tensor:
    """Return what decides who goes, float64 `[B, Hkv, held]`, of a context of `total` tokens."""
    own, first = positions[:, :, :held], start[:, None, None]
    rank = (mass[:, :, :held] if mass.shape[2] else own).double()
    kept = (own < first + sinks) | (own >= total - int(limit * recent))
    rank = torch.where(kept, math.inf, rank)
    return torch.where(own < first, -math.inf, rank)


def grouped_sinks(sinks: int, group: int) -> int:
    """Return how many tokens groups with the first `sinks` tokens hold at most, wherever those begin."""
    return -(-(sinks + group - 1) // group) * group if sinks else 0


def drop(
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
    positions: Tensor,
    mass: Tensor,
    seen: Tensor,
    budget: Tensor,
    start: Tensor,
    sinks: int,
    recent: float,
) -> None:
    """Drop a packed group of every head while there is one more than the budget asks for; the others keep order and codes.

    The budget is for tokens that are not held only because they lie in a group with one of the first.

    Nothing is dropped while some head has no group without a protected token.
    """
    held, done, limit = int(length), int(packed), int(budget)
    group = v_recent.shape[3] // v_scales.shape[2]
    residual = k_recent.shape[2]
    extra = grouped_sinks(sinks, group) - sinks  # what stays only because it lies beside the first tokens
    while held - limit - extra >= group and done:
        rank = _rank(positions, mass, start, held, int(seen), limit, sinks, recent)[:, :, :done]
        # A group of padding alone goes first; one that is partly padding counts by its other tokens.
        padding = rank == -math.inf
        mean = rank.masked_fill(padding, 0).unflatten(2, (-1, group)).sum(-1) / (~padding).unflatten(
            2, (-1, group)
        ).sum(-1)
        worst, chosen = mean.nan_to_num(nan=-math.inf, posinf=math.inf).min(-1)
        if bool((worst == math.inf).any()):
            return
        for tensor, step in ((k_codes, group // grouped.PANEL), (v_codes, group // 2), (k_scales, 1), (k_zeros, 1)):
            _close(tensor, chosen, step, 2, done // group)
        for tensor, step in ((v_scales, group), (v_zeros, group)):
            _close(tensor, chosen, step, 3, done // group)
        tail = held - done
        for tensor in (positions, *([mass] if mass.shape[2] else [])):
            _close(tensor, chosen, group, 2, done // group)
            tensor[:, :, done - group : done - group + tail] = tensor[:, :, done : done + tail].clone()
        # Token j lies at place j mod residual, and every one of them is now token j - group.
        for tensor in (k_recent, v_recent):
            tensor.copy_(tensor.roll(-(group % residual), 2))
        held, done = held - group, done - group
    length.fill_(held)
    packed.fill_(done)


def _close(tensor: Tensor, chosen: Tensor, step: int, dim: int, units: int) -> None:
    """Move what lies behind unit `chosen` `[B, Hkv]` of `step` places down by one unit."""
    order = torch.arange(units - 1, device=tensor.device)
    order = order + (order >= chosen[..., None])  # [B, Hkv, units - 1]
    parts = tensor.narrow(dim, 0, units * step).unflatten(dim, (units, step))
    shape: Sequence[int] = [-1 if n == dim else extent if n < 2 else 1 for n, extent in enumerate(parts.shape)]
    moved = parts.gather(dim, order.view(shape).expand(*parts.shape[:dim], units - 1, *parts.shape[dim + 1 :]))
    tensor.narrow(dim, 0, (units - 1) * step).copy_(moved.flatten(dim, dim + 1))


def _writes(*tensors: object) -> None:
    return None


def _fake_places(positions: Tensor, *rest: object) -> Tensor:
    return positions.new_empty(positions.shape[:2], dtype=torch.int64)


def register() -> None:
    """Register the ops, once."""
    written = "Tensor(a!) positions, Tensor(b!) mass, Tensor seen"
    define(TRACK, f"({written}, Tensor length, Tensor? gain, int count, int context) -> ()", track, _writes)
    define(
        PLACE,
        f"({written}, Tensor length, Tensor budget, Tensor start, Tensor? gain, int sinks, float recent, int context) -> Tensor",
        place,
        _fake_places,
    )
    names = (*grouped.NAMES, "length", "packed", "positions", "mass")
    state = ", ".join(f"Tensor({chr(ord('a') + number)}!) {name}" for number, name in enumerate(names))
    define(DROP, f"({state}, Tensor seen, Tensor budget, Tensor start, int sinks, float recent) -> ()", drop, _writes)
