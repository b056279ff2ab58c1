"""Choose columns and diagonals by what the last queries read (MInference, arXiv:2407.02490; FlexPrefill, arXiv:2502.20766).

The exact attention of a few probe rows shows which keys all queries come back to (verticals) and at which distances they look
(slashes). The last queries stand for all of them, so this choice sees the whole prompt: a key can change the map of queries
before it. It is for prefill, where the prompt is given as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from effcompile.ops.attention import define
from effcompile.ops.block_choice import top_cdf
from effcompile.ops.block_grid import BlockGrid
from effcompile.ops.probes import probe
from effcompile.ops.selectors.shape import HEAD, fake_map, for_heads, grid_of

NAME = "eff::vertical_slash_blocks_v1"


def vertical_slash_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    scale: float,
    coverage: float,
    recent: int,
    q_block: int,
    k_block: int,
) -> torch.Tensor:
    """Return the union of the fewest columns and the fewest diagonals that each hold `coverage` of the probe rows' attention.

    The predicate has a last key for each row (causal order). Columns are `k_block` wide, diagonals `q_block`. The probe rows are
    the last `recent` ones whose own key is real.
    """
    grid = grid_of(q, k, loads, sizes, keep, q_block, k_block)
    last = grid.limits.last
    if coverage >= 1 or last is None or q.shape[2] == 0:
        return for_heads(grid.some, q)
    rows, valid = probe_rows(grid, recent)
    read = probe(q, k, rows, valid, grid, scale, q_block)
    assert read.slashes is not None
    columns = F.pad(read.columns, (0, -k.shape[2] % k_block)).unflatten(-1, (-1, k_block)).sum(-1)
    nothing = torch.zeros((), dtype=torch.bool, device=q.device)
    vertical = top_cdf(columns, coverage, ~nothing, nothing)[:, :, None]
    first = torch.arange(read.slashes.shape[-1], device=q.device) == 0
    slash = top_cdf(read.slashes, coverage, ~nothing, first)
    some = grid.some
    return ((vertical | _diagonals(grid, slash, last)) & some) | grid.forced()


def probe_rows(grid: BlockGrid, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rows `[B, R]`, valid bool `[B, R]`) of the last real queries, R at most `count`, in their order."""
    batch, rows = grid.extents[0], grid.extents[2]
    count = min(count, rows)
    real = grid.real_rows
    if real is None:
        last = torch.arange(rows - count, rows, device=grid.device).expand(batch, -1)
        return last, torch.ones_like(last, dtype=torch.bool)
    places = torch.arange(rows, device=grid.device)
    found = torch.where(real.expand(batch, -1), places, -1).topk(count, dim=-1).values.sort(-1).values
    return found.clamp(min=0), found >= 0


def _diagonals(grid: BlockGrid, slash: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Return the blocks that chosen distances `[B, H, D]`, in bins as wide as a block of queries, cross."""
    width, height = grid.blocks[1], grid.blocks[0]
    tail = -last.shape[1] % height
    low = F.pad(last, (0, tail), value=2**30).unflatten(1, (-1, height)).amin(2)
    high = F.pad(last, (0, tail), value=-1).unflatten(1, (-1, height)).amax(2)
    begin = torch.arange(grid.counts[1], device=grid.device) * width
    nearest = (low[:, :, None] - begin - (width - 1)).clamp(min=0) // height
    farthest = (high[:, :, None] - begin).div(height, rounding_mode="floor").clamp(min=-1)
    sums = F.pad(slash.long().cumsum(-1), (1, 0))  # chosen bins before each
    shape = (*slash.shape[:2], *nearest.shape[1:])
    bins = slash.shape[-1]

    def before(at: torch.Tensor) -> torch.Tensor:
        index = at.clamp(0, bins).long()[:, None].expand(shape).flatten(2)
        return sums.gather(-1, index).unflatten(-1, shape[2:])

    return before(farthest + 1) > before(nearest)


def _fake(q: torch.Tensor, k: torch.Tensor, *rest: object) -> torch.Tensor:
    return fake_map(q, k, int(rest[-2]), int(rest[-1]))  # type: ignore[call-overload]


def register() -> None:
    """Register the op, once."""
    schema = f"({HEAD}, float scale, float coverage, int probe, int q_block, int k_block) -> Tensor"
    define(NAME, schema, vertical_slash_blocks, _fake)
