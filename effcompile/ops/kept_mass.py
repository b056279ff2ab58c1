"""Measure what a map leaves out: the probability mass that it keeps, a bound of the error, and the error itself.

The mass that a subset of keys keeps is c = exp(LSE of the subset - LSE of all), and O - O_subset = (1 - c) * (O_rest - O_subset):
the error of a row is at most (1 - c) times the diameter of V. The bound needs no second attention; the error tells how loose it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from effcompile.ops.attention_epilogue import attention_epilogue
from effcompile.ops.block_grid import BlockGrid


@dataclass(frozen=True)
class Kept:
    """Hold, for each row, the kept mass and the bound of its error `[B, Hq, Q]`, and of all rows the relative L2 error and density.

    Rows without keys keep everything. Density is kept over allowed pairs, where a block that the mask cuts counts half.
    """

    mass: torch.Tensor
    bound: torch.Tensor
    error: float
    density: float


def kept_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: torch.Tensor,
    narrowed: str,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    empty_row: str,
    scale: float,
    blocks: tuple[int, int],
) -> Kept:
    """Compare attention over a map `[B|1, H', Qb, Kb]` under the predicate `narrowed` with attention under `keep` alone.

    q `[B, Hq, Q, D]`, k `[B, Hkv, K, D]`, v `[B, Hkv, K, Dv]`; `narrowed` is `keep` itself where only the map leaves out keys.
    """
    rest = (loads, sizes)
    out, lse = attention_epilogue(q, k, v, chosen, None, None, *rest, narrowed, empty_row, scale, *blocks)
    whole, total = attention_epilogue(
        q, k, v, torch.ones_like(chosen), None, None, *rest, keep, empty_row, scale, *blocks
    )
    mass = torch.where(total == -math.inf, 1.0, (lse - total).exp().clamp(max=1.0))
    bound = (1 - mass) * diameter(v).repeat_interleave(q.shape[1] // k.shape[1], 1)[..., None]
    error = (out.double() - whole.double()).norm() / whole.double().norm().clamp(min=1e-30)
    extents = (*q.shape[:3], k.shape[2])
    some, allowed = (BlockGrid.of(extents, blocks, text, loads, sizes, q.device).weights for text in (narrowed, keep))
    heads = torch.ones_like(chosen)
    density = float((some * chosen).sum() / (allowed * heads).sum().clamp(min=1e-9))
    return Kept(mass, bound, float(error), density)


def diameter(v: torch.Tensor) -> torch.Tensor:
    """Return an upper bound of the largest distance between two values of v `[B, Hkv, K, Dv]`: `[B, Hkv]`.

    Twice the largest distance to the mean, at most twice the diameter itself.
    """
    wide = v.float()
    return 2 * (wide - wide.mean(2, keepdim=True)).norm(dim=-1).amax(-1)
