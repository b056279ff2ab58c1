"""Hold what selectors share: the grid of a call, and the fake of a map."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effcompile.ops.block_grid import BlockGrid

HEAD = "Tensor q, Tensor k, Tensor[] loads, SymInt[] sizes, str keep"
"""Begin every schema: queries `[B, Hq, Q, D]`, keys `[B, Hkv, K, D]`, and the predicate with its operands."""


def grid_of(
    q: torch.Tensor,
    k: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    q_block: int,
    k_block: int,
) -> BlockGrid:
    """Return the grid of a call."""
    extents = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return BlockGrid.of(extents, (q_block, k_block), keep, loads, sizes, q.device)


def fake_map(q: torch.Tensor, k: torch.Tensor, q_block: int, k_block: int) -> torch.Tensor:
    """Return an empty map of the right shape."""
    shape = (q.shape[0], q.shape[1], -(-q.shape[2] // q_block), -(-k.shape[2] // k_block))
    return q.new_empty(shape, dtype=torch.bool)


def for_heads(chosen: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return a map, or scores, `[B|1, H', Qb, Kb]` for every sequence and query head."""
    group = q.shape[1] // chosen.shape[1]
    wide = chosen.repeat_interleave(group, 1) if group > 1 else chosen
    return wide.expand(q.shape[0], -1, -1, -1).contiguous()
