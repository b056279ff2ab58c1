"""Define `eff::paged_decode_v1`: attention of one or a few new queries per sequence over the pages that were kept.

Pages are logical: page p of a sequence holds its tokens p * size ... ; a table may place it anywhere in a pool. Which pages
to keep is the choice of a selector (block top-k as in Kinetics, arXiv 2506.05333, or Quest, arXiv 2406.10774); without a list
all are read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effcompile.ops import flash
from effcompile.ops.attention import define

NAME = "eff::paged_decode_v1"
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor? table, Tensor? pages, Tensor? counts, float scale, float softcap, "
    "int splits) -> (Tensor, Tensor)"
)


def paged_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    pages: Tensor | None,
    counts: Tensor | None,
    scale: float,
    softcap: float,
    splits: int,
) -> tuple[Tensor, Tensor]:
    """Return (output `[B, Hq, Q, Dv]`, LSE `[B, Hq, Q]`) of the last Q tokens of each sequence, over the tokens of its kept pages.

    q `[B, Hq, Q, D]`; k `[B', Hkv, P, size, D]` and v `[B', Hkv, P, size, Dv]` are views of the cache, in any layout: B' = B
    for a contiguous cache, B' = 1 for a pool. lengths `[B]` int32 counts the valid tokens, the queries' own included, so
    query i sees tokens up to lengths - Q + i. table `[B, pages]` int32 gives the place of a logical page in P (None: its own
    number). pages `[B, Hkv, N]` int32 lists logical pages without repetition, of which the first counts `[B, Hkv]` are read.
    `splits` is how many programs share one sequence (0: chosen from the sizes); it changes the rounding only.
    """
    batch, heads, rows, _ = q.shape
    kv_heads, places, size = k.shape[1], k.shape[2], k.shape[3]
    device = q.device
    if pages is None:
        count = places if table is None else table.shape[1]
        pages = torch.arange(count, device=device).expand(batch, kv_heads, count)
    pages = pages.long()
    used = torch.ones_like(pages, dtype=torch.bool)
    if counts is not None:
        used = torch.arange(pages.shape[-1], device=device) < counts[..., None]
    tokens = pages[..., None] * size + torch.arange(size, device=device)
    used = used[..., None] & (tokens < lengths[:, None, None, None])
    # What is not read may be any number: it must not be looked up, and must not reach a product.
    safe = torch.where(used.any(-1), pages, 0)
    physical = safe if table is None else table.long().gather(1, safe.flatten(1)).view_as(safe)
    owner = torch.arange(batch, device=device)[:, None, None] if k.shape[0] > 1 else torch.zeros_like(physical)
    head = torch.arange(kv_heads, device=device)[None, :, None]
    keys, values = (
        torch.where(used[..., None], cache[owner, head, physical], 0).flatten(2, 3) for cache in (k, v)
    )  # [B, Hkv, N * size, D]
    last = (lengths[:, None] - rows + torch.arange(rows, device=device))[:, None, :, None]
    kept = used.flatten(2)[:, :, None] & (tokens.flatten(2)[:, :, None] <= last)
    masked = flash.scores(q, keys, scale, softcap).masked_fill(~kept.repeat_interleave(heads // kv_heads, 1), -math.inf)
    out, lse = flash.weighted(masked, values)
    return out.to(v.dtype), lse


BODIES = {NAME: paged_decode}


def register() -> None:
    """Register the op, once."""
    define(NAME, SCHEMA, paged_decode, flash.fake_pair)
