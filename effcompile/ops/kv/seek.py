"""Find from the places that a model writes to how many tokens it means its cache to hold."""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.ops.attention import define
from effcompile.ops.kv import common

SEEK = "eff::kv_seek_v1"


def seek(length: Tensor, places: Tensor, count: int, limit: int, whole: bool) -> Tensor:
    """Return how many tokens stay, int64 `[]`: those before the first of `places`, where `count` tokens are about to go.

    With `whole`, all or none.

    Raises:
        EffError: EFF-K203 where the places are no neighbors, or begin elsewhere than behind what is held or before it; EFF-K201 for
            more than `limit` tokens. Nothing has been written then.
    """
    first = places.reshape(-1)[:1].long()
    if places.device.type == "cpu":
        start, held = int(first), int(length)
        if places.numel() > 1 and not bool((places[1:] - places[:-1] == 1).all()):
            raise EffError(
                "EFF-K203",
                "a compressed cache takes tokens at places that are neighbors",
                hint="one sequence of positions a call",
            )
        if not 0 <= start <= held or (whole and start not in (0, held)):
            allowed = f"0 or {held}" if whole else f"0 to {held}"
            raise EffError(
                "EFF-K203",
                f"the cache holds {held} tokens, and new ones are written to place {start}; it can be {allowed}",
                hint="begin again at 0, or go on behind the last token",
            )
        if limit:
            common.check_room(start, count, limit)
    return first.reshape(()).clone()


def _fake(length: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(length)


def register() -> None:
    """Register the op, once."""
    define(SEEK, "(Tensor length, Tensor places, int count, int limit, bool whole) -> Tensor", seek, _fake)
