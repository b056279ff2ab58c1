"""Turn a mask over a context into one over the places of a cache that holds a window of it.

Masks count the tokens of the context, and a window lies at places of its own. A mask that lets a query see a token which was
dropped is an error, not a token less: the model's mask and its window say different things then.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.ops.attention import define
from effcompile.ops.kv import evict, scores

MASK = "eff::kv_window_mask_v1"


def window_mask(mask: Tensor, positions: Tensor, length: Tensor, seen: Tensor, count: int, context: int) -> Tensor:
    """Return a mask `[B|1, Hq|1, Q, C + count]` over the places of a cache and `count` tokens behind the `length` held ones.

    mask `[B|1, Hq|1, Q, N]`, bool or added, is over the context, of which `seen` tokens have been there and no more than
    `context` may be, 0 for any. positions int32 `[B, Hkv, C]`, the same for all heads, say which token lies at a place, -1 for one
    that was taken back.

    Raises:
        EffError: EFF-K201 for a context that gets too long; EFF-K202 where the mask shows a token that is not held any more, or
            does not reach the last one (on CPU).
    """
    own = positions[0, 0].long()
    if length.device.type == "cpu":
        held, total = int(length), int(seen)
        evict.check_context(total, count, context)
        first = total - int((own[:held] >= 0).sum())
        if mask.shape[3] < total + count:
            raise EffError(
                "EFF-K202", f"a mask {list(mask.shape)} where {total + count} tokens of the context are to be covered"
            )
        if first and bool(scores.visible(mask[..., :first]).any()):
            raise EffError(
                "EFF-K202",
                f"a mask shows tokens before token {first}, and a layer with a sliding window does not hold those any more",
                hint="the mask of a sliding layer hides what its window has left",
            )
    fresh = torch.arange(count, device=own.device)
    places = torch.cat([own, own.new_zeros(count)]).index_copy(0, length + fresh, seen + fresh)
    found = mask.index_select(3, places.clamp(0, mask.shape[3] - 1))
    return found.masked_fill(places < 0, False if mask.dtype == torch.bool else -math.inf)


def _fake(mask: Tensor, positions: Tensor, length: Tensor, seen: Tensor, count: int, context: int) -> Tensor:
    return mask.new_empty((*mask.shape[:3], positions.shape[2] + count))


def register() -> None:
    """Register the op, once."""
    schema = "(Tensor mask, Tensor positions, Tensor length, Tensor seen, int count, int context) -> Tensor"
    define(MASK, schema, window_mask, _fake)
