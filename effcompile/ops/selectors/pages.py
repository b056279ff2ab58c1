"""Choose pages of keys for one query, by their mean (Kinetics, arXiv:2506.05333) or a bound (Quest, arXiv:2406.10774).

The summaries are computed anew at each step, since a graph holds no state beside the cache: that reads every key that may be read
once, half of what dense decode reads. On CPU a C++ kernel does it in one pass that writes nothing but
scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effcompile.core.expr import TRUE
from effcompile.ops import native
from effcompile.ops.attention import define
from effcompile.ops.block_choice import top_k
from effcompile.ops.block_grid import grouped, means
from effcompile.ops.native_pages import choose_pages
from effcompile.ops.page_stats import page_bounds, page_stats
from effcompile.ops.row_limits import split_limits, values
from effcompile.ops.selectors.shape import HEAD, fake_map, for_heads, grid_of

NAME = "eff::pages_v1"


def pages(
    q: torch.Tensor,
    k: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    budget: int,
    local: int,
    page: int,
    score: str,
) -> torch.Tensor:
    """Return the map of `budget` tokens in pages of `page`, of each query: the first page, the `local` last ones, the best others.

    `score` is "mean", taken over the heads that share keys, which get one map; or "bound", for each query head.
    """
    if q.shape[2] == 1 and native.runs(native.PAGES, q, k) and split_limits(keep).rest == TRUE:
        limits = values(split_limits(keep), (*q.shape[:3], k.shape[2]), loads, sizes)
        return choose_pages(q, k, limits, budget // page, local, page, score == "bound")
    grid = grid_of(q, k, loads, sizes, keep, 1, page)
    some, forced = grid.some, grid.forced(local)
    count = (budget // page - forced.sum(-1)).clamp(min=0)
    free, real = some & ~forced, grid.limits.keys
    if score == "mean":
        query = q.unflatten(1, (k.shape[1], -1)).float().mean(2)
        scores = for_heads(grouped(query, means(k, page, real).float()), q)
    else:
        scores = page_bounds(q.float(), page_stats(k, page, real))
    return (top_k(scores, count, free) | forced).contiguous()


def _fake(q: torch.Tensor, k: torch.Tensor, *rest: object) -> torch.Tensor:
    return fake_map(q, k, 1, int(rest[-2]))  # type: ignore[call-overload]


def register() -> None:
    """Register the op, once."""
    define(NAME, f"({HEAD}, int budget, int local, int page, str score) -> Tensor", pages, _fake)
