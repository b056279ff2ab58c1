"""Choose blocks by sums along antidiagonals (XAttention, arXiv:2503.16428).

In a square of `stride` queries and keys the antidiagonal crosses every vertical and every slash of the square, so one product of
reshaped q and k, at 1 / stride of the cost of all scores, sees what either pattern holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from effcompile.ops import native
from effcompile.ops.attention import define
from effcompile.ops.block_choice import top_cdf
from effcompile.ops.block_grid import BlockGrid, block_mass
from effcompile.ops.selectors.shape import HEAD, fake_map, grid_of

NAME = "eff::antidiagonal_blocks_v1"


def antidiagonal_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    scale: float,
    threshold: float,
    stride: int,
    q_block: int,
    k_block: int,
) -> torch.Tensor:
    """Return the smallest map whose blocks hold `threshold` of each row's estimated mass in the past (`BlockGrid.past`).

    `stride` S divides both blocks. The score of S queries and S keys is the mean along the antidiagonal, scale / S * sum over r
    of q[S - 1 - r] . k[r]; masked keys and positions past the end count as zeros.
    """
    grid = grid_of(q, k, loads, sizes, keep, q_block, k_block)
    if threshold >= 1:
        mass = torch.ones((*q.shape[:2], *grid.counts), device=q.device)
    elif native.runs(native.SCORES, q, k):
        mass = _compiled(q, k, grid, scale, stride)
    else:
        mass = antidiagonal_mass(q, k, grid, scale, stride)
    return top_cdf(mass, threshold, grid.some, grid.forced())


def antidiagonal_mass(q: torch.Tensor, k: torch.Tensor, grid: BlockGrid, scale: float, stride: int) -> torch.Tensor:
    """Return the estimated mass of each block `[B, Hq, Qb, Kb]`, by torch operations."""
    real = grid.limits.keys
    keys = k if real is None else k * real[:, None, :, None].to(k.dtype)
    queries = F.pad(q, (0, 0, 0, -q.shape[2] % stride)).unflatten(2, (-1, stride)).flip(3).flatten(3)
    keys = F.pad(keys, (0, 0, 0, -k.shape[2] % stride)).unflatten(2, (-1, stride)).flatten(3)
    return block_mass(grid, queries, keys, (stride, stride), scale / stride)


def _compiled(q: torch.Tensor, k: torch.Tensor, grid: BlockGrid, scale: float, stride: int) -> torch.Tensor:
    """Return what `antidiagonal_mass` does, from the C++ kernel, which rounds no score to the dtype of q."""
    q, k = (native.dense_rows(x) for x in (q, k))
    seen, real = grid.past((stride, stride)), grid.limits.keys
    shape = [q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], stride, *grid.blocks]
    shape += [*q.stride()[:3], *k.stride()[:3], seen.shape[0], seen.shape[1], 1 if real is None else real.shape[0]]
    shape.append(torch.get_num_threads())
    out = torch.empty((*q.shape[:2], *grid.counts), dtype=torch.float32)
    native.call(native.SCORES, "eff_antidiagonal_mass", q.dtype, shape, [q, k, seen, real, out], scale / stride)
    return out


def _fake(q: torch.Tensor, k: torch.Tensor, *rest: object) -> torch.Tensor:
    return fake_map(q, k, int(rest[-2]), int(rest[-1]))  # type: ignore[call-overload]


def register() -> None:
    """Register the op, once."""
    schema = f"({HEAD}, float scale, float threshold, int stride, int q_block, int k_block) -> Tensor"
    define(NAME, schema, antidiagonal_blocks, _fake)
