"""Choose blocks by a softmax over means of blocks, where means can be trusted (SpargeAttn, arXiv:2502.18137)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effcompile.ops.attention import define
from effcompile.ops.block_choice import top_cdf
from effcompile.ops.block_grid import alike, block_mass, means
from effcompile.ops.selectors.shape import HEAD, fake_map, for_heads, grid_of

NAME = "eff::pooled_blocks_v1"


def pooled_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    scale: float,
    cdf: float,
    similarity: float,
    q_block: int,
    k_block: int,
) -> torch.Tensor:
    """Return the smallest map whose blocks hold `cdf` of the mass of each row of means, in the past (`BlockGrid.past`).

    A block whose positions are less alike than `similarity` (mean cosine of its pairs) is not judged by its mean: such queries
    read every block, such keys are read by every query.
    """
    grid = grid_of(q, k, loads, sizes, keep, q_block, k_block)
    if cdf >= 1:
        return for_heads(grid.some, q)
    rows, real = grid.real_rows, grid.limits.keys
    some, past, forced = grid.some, grid.past(), grid.forced()
    if similarity > 0:
        (queries, of_queries), (keys, of_keys) = alike(q, q_block, rows), alike(k, k_block, real)
        scattered = for_heads((of_keys < similarity)[:, :, None], q)
        forced = forced | (some & scattered) | (some & (of_queries < similarity)[..., None])
        past = past & ~scattered
    else:
        queries, keys = means(q, q_block, rows), means(k, k_block, real)
    mass = block_mass(grid, queries, keys, grid.blocks, scale, past)
    return top_cdf(mass, cdf, some, forced)


def _fake(q: torch.Tensor, k: torch.Tensor, *rest: object) -> torch.Tensor:
    return fake_map(q, k, int(rest[-2]), int(rest[-1]))  # type: ignore[call-overload]


def register() -> None:
    """Register the op, once."""
    schema = f"({HEAD}, float scale, float cdf, float similarity, int q_block, int k_block) -> Tensor"
    define(NAME, schema, pooled_blocks, _fake)
