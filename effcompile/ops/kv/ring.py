"""Say which tokens a ring of places holds that a graph writes to positions of its own: token p lies at place p modulo their number.

A ring holds what a sliding window can see, and some tokens more so that the last ones can be taken back. `positions` int32
`[1, 1, C]` says which token lies at a place, -1 for one that was taken back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.ops.attention import define
from effcompile.ops.kv import common

RING = "eff::kv_ring_v1"


def ring(
    positions: Tensor, length: Tensor, seen: Tensor, places: Tensor, count: int, window: int, limit: int
) -> Tensor:
    """Forget the tokens from the first of `places`, int64 `[S]`, on, where `count` tokens are about to go; return that, int64 `[]`.

    `length` places of the ring were written so far, for a context of `seen` tokens.

    Raises:
        EffError: EFF-K203 where the places are no neighbors, or begin behind what was seen, or where the window of the first one
            has left the ring; EFF-K201 for a context of more than `limit` tokens. Nothing is written then.
    """
    first = places.reshape(-1)[:1].long()
    if places.device.type == "cpu":
        start, total, held = int(first), int(seen), positions[0, 0, : int(length)]
        if places.numel() > 1 and not bool((places[1:] - places[:-1] == 1).all()):
            raise EffError(
                "EFF-K203",
                "a compressed cache takes tokens at places that are neighbors",
                hint="one sequence of positions a call",
            )
        if not 0 <= start <= total:
            raise EffError(
                "EFF-K203",
                f"the cache has seen {total} tokens, and new ones are written to place {start}",
                hint="begin again at 0, or go on behind the last token",
            )
        common.check_room(start, count, limit)
        oldest = total - int((held >= 0).sum())
        if start and oldest > max(0, start - window + 1):
            raise EffError(
                "EFF-K203",
                f"the cache cannot go back from {total} to {start} tokens: it has a window of {window} and holds those from token "
                f"{oldest} on",
                hint="take back fewer tokens; or begin again at 0",
            )
    positions.masked_fill_(positions >= first, -1)
    return first.reshape(()).clone()


def _fake(positions: Tensor, length: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(length)


def register() -> None:
    """Register the op, once."""
    given = "Tensor length, Tensor seen, Tensor places, int count, int window, int limit"
    define(RING, f"(Tensor(a!) positions, {given}) -> Tensor", ring, _fake)
