"""Read what a few probe rows attend to: how much each key gets, at which distances, and how many of the rows see a key.

`vertical-slash` and `zipvl` judge a whole layer by such rows. On CPU a C++ kernel (`cpp/probes.cpp`) makes the sums without the
probabilities themselves; the composition of torch operations serves every other device and predicates that tell apart single pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from effcompile.core.expr import TRUE
from effcompile.ops import native
from effcompile.ops.block_grid import BlockGrid, grouped
from effcompile.ops.column_sums import kept_rows
from effcompile.ops.row_limits import split_limits


@dataclass(frozen=True)
class Probe:
    """Hold sums of the probabilities of probe rows: columns `[B, Hq, K]`, slashes `[B, Hq, bins]` or None, seen `[B, K]`.

    A slash is a distance to a row's last key, in bins; `seen` counts the rows that may read a key, for some head.
    """

    columns: torch.Tensor
    slashes: torch.Tensor | None
    seen: torch.Tensor


def probe(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor,
    valid: torch.Tensor,
    grid: BlockGrid,
    scale: float,
    width: int | None = None,
) -> Probe:
    """Sum the attention of `rows` `[B, R]` of q `[B, Hq, Q, D]` over k `[B, Hkv, K, D]`; rows that are not `valid` add nothing.

    `width` keys of distance make a bin of slashes, for a predicate that has a last key for each row.
    """
    index = rows[:, None, :, None].expand(q.shape[0], q.shape[1], -1, q.shape[3])
    queries = q.gather(2, index)
    if native.runs(native.PROBES, q, k) and split_limits(grid.keep).rest == TRUE:
        return _compiled(queries, k, rows, valid, grid, scale, width)
    return composed(queries, k, rows, valid, grid, scale, width)


def composed(
    queries: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor,
    valid: torch.Tensor,
    grid: BlockGrid,
    scale: float,
    width: int | None,
) -> Probe:
    """Return what `probe` does, by torch operations, for the `queries` `[B, Hq, R, D]` of its rows."""
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    extents = (queries.shape[0], queries.shape[1], k.shape[2])
    seen = kept_rows(grid.keep, extents, rows, grid.loads, grid.sizes) & valid[:, None, :, None]
    scores = grouped(queries.to(wide), k.to(wide)).mul_(scale).masked_fill_(~seen, -math.inf)
    probs = scores.softmax(-1).nan_to_num_()
    slashes = None
    if width is not None:
        assert grid.limits.last is not None
        own = grid.limits.last.expand(extents[0], -1).gather(1, rows).long()
        slashes = _by_distance(probs, own, -(-k.shape[2] // width), width)
    return Probe(probs.sum(2), slashes, seen.any(1).sum(1))


def _by_distance(probs: torch.Tensor, own: torch.Tensor, bins: int, width: int) -> torch.Tensor:
    """Return sums `[B, H, bins]` of probabilities `[B, H, R, K]` by distance to the row's own key `[B, R]`, `width` to a bin."""
    # A bin of a row is a range of keys: the difference of two running sums.
    sums = F.pad(probs.cumsum(-1), (1, 0))
    ends = own[:, :, None] + 1 - torch.arange(bins + 1, device=probs.device) * width
    ends = ends.clamp(0, probs.shape[-1])[:, None].expand(*probs.shape[:3], -1)
    found = sums.gather(-1, ends)
    return (found[..., :-1] - found[..., 1:]).clamp(min=0).sum(2)


def _compiled(
    queries: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor,
    valid: torch.Tensor,
    grid: BlockGrid,
    scale: float,
    width: int | None,
) -> Probe:
    q, k = (native.dense_rows(x) for x in (queries, k))
    batch, columns, real = q.shape[0], k.shape[2], grid.limits.keys
    first, last = _ends(grid, rows, valid, columns)
    bins = 0 if width is None else -(-columns // width)
    sums = torch.empty((*q.shape[:2], columns))
    slashes = None if width is None else torch.empty((*q.shape[:2], bins))
    sizes = [batch, q.shape[1], k.shape[1], q.shape[2], columns, q.shape[3], width or 1, bins]
    sizes += [*q.stride()[:3], *k.stride()[:3], 1 if real is None else real.shape[0], torch.get_num_threads()]
    native.call(native.PROBES, "eff_probe", q.dtype, sizes, [q, k, first, last, real, sums, slashes], scale)
    return Probe(sums, slashes, _seen(first, last, real, columns))


def _ends(grid: BlockGrid, rows: torch.Tensor, valid: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first and the last key of each row `[B, R]` int32, nothing for a row that is not valid."""

    def taken(x: torch.Tensor | None, otherwise: int) -> torch.Tensor:
        if x is None:
            return torch.full_like(rows, otherwise, dtype=torch.int32)
        return x.expand(rows.shape[0], -1).gather(1, rows)

    first, last = taken(grid.limits.first, 0), taken(grid.limits.last, columns - 1)
    return first.contiguous(), torch.where(valid, last, -1).to(torch.int32).contiguous()


def _seen(first: torch.Tensor, last: torch.Tensor, real: torch.Tensor | None, columns: int) -> torch.Tensor:
    """Return how many ranges `[B, R]` hold each key `[B, K]`, 0 for keys that are not real."""
    one = torch.ones_like(first)
    begin, end = first.clamp(0, columns).long(), (last + 1).clamp(0, columns).long()
    end = torch.maximum(begin, end)
    steps = torch.zeros((first.shape[0], columns + 1), dtype=torch.int32)
    count = steps.scatter_add(1, begin, one).scatter_add(1, end, -one).cumsum(1)[:, :-1]
    return count if real is None else count * real
