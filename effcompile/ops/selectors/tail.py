"""Let the last queries read everything: the end of a prompt asks, and a map that was made for speed may miss what it asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effcompile.ops.attention import define
from effcompile.ops.selectors.shape import HEAD, for_heads, grid_of

NAME = "eff::tail_blocks_v1"


def tail_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    chosen: torch.Tensor,
    tail: int,
    q_block: int,
    k_block: int,
) -> torch.Tensor:
    """Return a map bool `[B, Hq, Qb, Kb]` with every allowed block in the rows that hold one of the last `tail` queries."""
    first = max(0, q.shape[2] - tail) // q_block
    whole = for_heads(grid_of(q, k, loads, sizes, keep, q_block, k_block).some, q)
    return torch.cat((chosen[:, :, :first], whole[:, :, first:]), 2)


def _fake(
    q: torch.Tensor, k: torch.Tensor, loads: object, sizes: object, keep: str, chosen: torch.Tensor, *rest: int
) -> torch.Tensor:
    return torch.empty_like(chosen)


def register() -> None:
    """Register the op, once."""
    schema = f"({HEAD}, Tensor chosen, int tail, int q_block, int k_block) -> Tensor"
    define(NAME, schema, tail_blocks, _fake)
