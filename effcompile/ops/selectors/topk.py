"""Choose blocks by the mean of their scores: centroids of queries against centroids of keys (Kinetics, arXiv:2506.05333).

The product of two means is the mean of the products, so a block's score is exactly the mean of its scores before the softmax, over
all queries of all heads that share the keys. The heads of a group get one map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effcompile.ops.attention import define
from effcompile.ops.block_choice import row_budgets, top_k
from effcompile.ops.block_grid import means
from effcompile.ops.selectors.shape import HEAD, fake_map, for_heads, grid_of

NAME = "eff::topk_blocks_v1"


def topk_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    density: float,
    q_block: int,
    k_block: int,
) -> torch.Tensor:
    """Return the map that keeps `density` of the allowed pairs, forced blocks among them; never less than those."""
    grid = grid_of(q, k, loads, sizes, keep, q_block, k_block)
    if density >= 1:
        return for_heads(grid.some, q)
    queries = means(q, q_block, grid.real_rows).unflatten(1, (k.shape[1], -1)).mean(2)
    scores = torch.matmul(queries, means(k, k_block, grid.limits.keys).transpose(-1, -2))
    some, forced = grid.some, grid.forced()
    free, weights = some & ~forced, grid.weights
    total = density * weights.sum((-1, -2)) - (weights * forced).sum((-1, -2))
    budgets = row_budgets(free.sum(-1), total)
    return top_k(for_heads(scores, q), budgets, free) | forced


def _fake(q: torch.Tensor, k: torch.Tensor, *rest: object) -> torch.Tensor:
    return fake_map(q, k, int(rest[-2]), int(rest[-1]))  # type: ignore[call-overload]


def register() -> None:
    """Register the op, once."""
    define(NAME, f"({HEAD}, float density, int q_block, int k_block) -> Tensor", topk_blocks, _fake)
