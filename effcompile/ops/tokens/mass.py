"""Define `eff::token_mass_v1`: the attention that each token gets from some rows, or from all, a mean over heads.

SpAtten (arXiv:2012.09852), FastV (arXiv:2403.06764), PyramidDrop (arXiv:2410.17247) and EViT (arXiv:2202.07800) rank tokens by
it and differ in the rows. Nothing of size Q x K is stored: on CPU a C++ kernel adds up probabilities as it makes them, elsewhere
some rows of scores exist at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from effcompile.core.expr import TRUE
from effcompile.core.expr_eval import evaluate, from_json
from effcompile.ops import native
from effcompile.ops.attention import define
from effcompile.ops.block_grid import BlockGrid
from effcompile.ops.probes import probe
from effcompile.ops.row_limits import split_limits

NAME = "eff::token_mass_v1"
_ROWS = 256  # rows of scores that exist at a time
_GRID = 128


def token_mass(
    q: Tensor, k: Tensor, rows: Tensor | None, loads: Sequence[Tensor], sizes: Sequence[int], keep: str, scale: float
) -> Tensor:
    """Return `[B, N]`: the probability that rows give to each token, summed over rows and averaged over heads.

    q `[B, Hq, N, D]`, k `[B, Hkv, N, D]`; rows `[B, R]` int64 are places among the queries, None for all of them. Float32, float64
    for float64. Sums over tokens are the number of rows that read any.
    """
    batch, heads, length, _ = q.shape
    if native.runs(native.PROBES, q, k) and split_limits(keep).rest == TRUE:
        if rows is None:
            rows = torch.arange(length, device=q.device).expand(batch, -1)
        extents = (batch, heads, length, k.shape[2])
        grid = BlockGrid.of(extents, (_GRID, _GRID), keep, loads, sizes, q.device)
        return probe(q, k, rows, torch.ones_like(rows, dtype=torch.bool), grid, scale).columns.mean(1)
    return written(q, k, rows, loads, sizes, keep, scale)


def written(
    q: Tensor, k: Tensor, rows: Tensor | None, loads: Sequence[Tensor], sizes: Sequence[int], keep: str, scale: float
) -> Tensor:
    """Return what `token_mass` does, by torch operations that any runtime has."""
    batch, heads, _, width = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = heads // k.shape[1]
    keys = k.to(wide)
    if group > 1:
        keys = keys[:, :, None].expand(-1, -1, group, -1, -1).reshape(batch, heads, k.shape[2], width)
    predicate = from_json(keep)
    if rows is not None:
        q = q.gather(2, rows[:, None, :, None].expand(-1, heads, -1, width))
    total = None
    for begin in range(0, q.shape[2], _ROWS):
        part = q[:, :, begin : begin + _ROWS].to(wide)
        scores = part @ keys.transpose(-1, -2) * scale
        if predicate != TRUE:
            count = part.shape[2]
            places = torch.arange(begin, begin + count, device=q.device).expand(batch, -1) if rows is None else rows
            scores = scores.masked_fill(
                ~_kept(predicate, places[:, None, :, None], k.shape[2], loads, sizes), -math.inf
            )
        probs = scores.softmax(-1)
        if predicate != TRUE:
            probs = torch.where(scores.amax(-1, keepdim=True) == -math.inf, 0.0, probs)
        part_sum = probs.sum(2).mean(1)
        total = part_sum if total is None else total + part_sum
    assert total is not None
    return total


def _kept(predicate: object, places: Tensor, columns: int, loads: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    device, batch = places.device, places.shape[0]
    axes = (
        torch.arange(batch, device=device).reshape(-1, 1, 1, 1),
        torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device),
        places,
        torch.arange(columns, device=device).reshape(1, 1, 1, -1),
    )
    return evaluate(predicate, axes, loads, sizes)  # type: ignore[arg-type]


def _fake(q: Tensor, k: Tensor, *rest: object) -> Tensor:
    return q.new_empty((q.shape[0], k.shape[2]), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def register() -> None:
    """Register the op, once."""
    define(
        NAME,
        "(Tensor q, Tensor k, Tensor? rows, Tensor[] loads, SymInt[] sizes, str keep, float scale) -> Tensor",
        token_mass,
        _fake,
    )
