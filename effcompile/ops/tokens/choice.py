"""Choose tokens: those of the largest scores, or pairs of the most alike ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def first(scores: Tensor, count: int, stable: bool) -> Tensor:
    """Return the places `[B, count]` of the largest scores `[B, N]`, largest first; `stable`: of equal ones the first."""
    if stable:
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return scores.topk(count, dim=-1).indices


def rising(index: Tensor, stable: bool) -> Tensor:
    """Return places in rising order."""
    return index.sort(dim=-1).values if stable else index.topk(index.shape[1], dim=-1, largest=False).values


def keep_top(scores: Tensor, held: Tensor | None, real: Tensor | None, left: int, stable: bool) -> Tensor:
    """Return the places `[B, left]` of the tokens that stay, in their order.

    Tokens that are `held` come first, then those of the largest scores `[B, N]`, and padding (not `real`) last.
    """
    if real is not None:
        scores = scores.masked_fill(~real, -math.inf)
    if held is not None:
        scores = scores.masked_fill(held, math.inf)
    return rising(first(scores, left, stable), stable)


def match_pairs(keys: Tensor, held: Tensor | None, merged: int, stable: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Match tokens that are alike (ToMe's bipartite matching) by the mean of their keys `[B, H, N, D]` over heads.

    Every even token looks for the most similar odd one; the `merged` most similar pairs are merged. Tokens that are `held` `[B, N]`
    are in no pair. Returns (index `[B, N - merged]` of those that stay, source `[B, merged]`, into `[B, merged]`: the place among
    those that stay).
    """
    metric = keys.to(torch.float32 if keys.dtype.itemsize < 4 else keys.dtype).mean(1)
    metric = metric / metric.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    count = metric.shape[1]
    likeness = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if held is not None:
        likeness = likeness.masked_fill(held[:, ::2, None], -math.inf).masked_fill(held[:, None, 1::2], -math.inf)
    best, partner = likeness.max(-1)
    even = first(best, merged, stable)
    source, target = even * 2, partner.gather(1, even) * 2 + 1
    return _merged(source, target, count, stable)


def match_cells(x: Tensor, grid: tuple[int, int], merged: int, stable: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Match tokens of an image with the corners of its 2 x 2 cells (ToMeSD) by the cosine of x `[B, N, C]`.

    The image is the last height * width tokens, row by row. Each token that is no corner looks for the most similar corner, of any
    cell; the `merged` most similar pairs are merged. Returns what `match_pairs` does.
    """
    height, width = grid
    first_place, device = x.shape[1] - height * width, x.device
    rows, columns = (torch.arange(size, device=device) for size in grid)
    places = rows[:, None] * width + columns + first_place
    corners = places[::2, ::2].flatten()
    others = torch.cat([places[::2, 1::2].flatten(), places[1::2].flatten()])
    wide = x.to(torch.float32 if x.dtype.itemsize < 4 else x.dtype)
    unit = wide / wide.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    best, partner = (unit.index_select(1, others) @ unit.index_select(1, corners).transpose(1, 2)).max(-1)
    chosen = first(best, merged, stable)
    source = others.expand(x.shape[0], -1).gather(1, chosen)
    target = corners.expand(x.shape[0], -1).gather(1, partner.gather(1, chosen))
    return _merged(source, target, x.shape[1], stable)


def _merged(source: Tensor, target: Tensor, count: int, stable: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return (index of those that stay, source, place of each target among those that stay) of a merge of `count` tokens."""
    gone = torch.zeros((source.shape[0], count), dtype=torch.int64, device=source.device).scatter(
        1, source, torch.ones_like(source)
    )
    places = torch.arange(count, device=source.device)
    index = rising(torch.where(gone == 1, places + count, places), stable)[:, : count - source.shape[1]]
    into = target - gone.cumsum(1).gather(1, target)
    return index, source, into
