"""Score the tokens of a context for policies that drop some: by what queries read, with and without noise.

All are plain torch operations in float32 over blocks of queries, since a prompt is scored once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effcompile.ops import flash

_AT_ONCE = 1 << 22  # scores that exist at a time
_WORD = 0xFFFFFFFF


def masked_scores(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, place: int, scale: float, softcap: float
) -> Tensor:
    """Return scores `[B, Hq, Q, N]`, -inf where a query does not see the key.

    Query i is that of key `place` + i, which is the last that it sees where `causal` is set; mask `[B|1, Hq|1, Q, N]`.
    """
    found = flash.scores(q, k, scale, softcap)
    if mask is not None and mask.dtype == torch.bool:
        found = found.masked_fill(~mask, -math.inf)
    elif mask is not None:
        found = (found + mask).masked_fill(~visible(mask), -math.inf)
    if causal:
        own = torch.arange(place, place + q.shape[2], device=q.device)[:, None]
        found = found.masked_fill(torch.arange(k.shape[2], device=q.device) > own, -math.inf)
    return found


def visible(mask: Tensor) -> Tensor:
    """Return what a mask lets through, bool: of a mask that is added, all but -inf and the least numbers of its dtype."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def weights(scores: Tensor) -> Tensor:
    """Return the softmax of scores; a row that sees nothing gives 0."""
    # Not softmax, which a dry run of a prompt would report as attention that was missed.
    lse = torch.logsumexp(scores, -1, keepdim=True)
    return torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)).nan_to_num(nan=0.0)


def by_key_head(per_query_head: Tensor, kv_heads: int) -> Tensor:
    """Sum `[B, Hq, ...]` over the query heads of each key head: `[B, Hkv, ...]`."""
    return per_query_head.unflatten(1, (kv_heads, -1)).sum(2)


def gained(scores: Tensor, lse: Tensor, kv_heads: int) -> Tensor:
    """Return what queries read of each token, `[B, Hkv, N]`, of scores `[B, Hq, Q, N]` and the LSE over these and others."""
    shift = torch.where(lse == -math.inf, 0.0, lse)[..., None]
    return by_key_head(torch.exp(scores - shift).nan_to_num(nan=0.0).sum(2), kv_heads)


def by_query_head(per_key_head: Tensor, heads: int) -> Tensor:
    """Repeat `[B, Hkv, ...]` for the query heads of each key head: `[B, Hq, ...]`."""
    return per_key_head.repeat_interleave(heads // per_key_head.shape[1], 1)


def rows_at_once(q: Tensor, k: Tensor) -> int:
    """Return how many queries may be scored at a time."""
    return max(1, _AT_ONCE // max(1, q.shape[0] * q.shape[1] * k.shape[2]))


# --- noise that depends on where it is asked for, and on nothing else ------------------------------------------------------------


def _mixed(x: Tensor) -> Tensor:
    """Return 32 well mixed bits of 32 bits, as int64."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & _WORD
    return x ^ (x >> 16)


def gumbel(seed: int, layer: int, heads: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Return Gumbel(0, 1) numbers, float32 `[B, Hq, Q, N]`, that depend on seed, layer, head, row and column only.

    Rows int64 `[B, Q]` and columns int64 `[B, Hq, N]` count tokens; the same numbers come whatever is asked for beside them.
    """
    key = (seed * 0x9E3779B1 + layer * 0x85EBCA77 + 0x165667B1) & _WORD
    head = _mixed(torch.arange(heads, device=rows.device) * 0xC2B2AE3D + key & _WORD)
    row = _mixed((rows[:, None] * 0x27D4EB2F & _WORD) ^ head[:, None])  # [B, Hq, Q]
    column = _mixed(columns * 0x9E3779B1 & _WORD)
    bits = _mixed(row[..., None] ^ column[:, :, None])
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # no less than 2^-24 and no more than 1 - 2^-24, exactly
    return -torch.log(-torch.log(uniform))
