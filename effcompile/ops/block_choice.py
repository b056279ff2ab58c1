"""Choose blocks by their scores: the best k of each row, or the fewest that hold a share of its mass.

Both leave forced blocks to their caller or count them first. Ties go to the earlier block or stay together, so the choice is
deterministic.
"""

from __future__ import annotations

import math

import torch

from effcompile.ops import native

STEPS = 24  # of the bisection: a threshold is found to 2**-24 of the largest mass


def row_budgets(free: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Share `total` `[...]` blocks among rows that have `free` ones `[..., Qb]`: the same number for each, short rows less.

    A share of each row's own blocks instead would starve the early queries, whose few blocks hold all of their mass. Returns
    whole numbers `[..., Qb]` that add up to the total, to within one block a row.
    """
    wanted = total[..., None].double().clamp(min=0)
    low, high = torch.zeros_like(wanted), free.amax(-1, keepdim=True).double()
    for _ in range(STEPS):
        middle = (low + high) / 2
        short = torch.minimum(free.double(), middle).sum(-1, keepdim=True) < wanted
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    # Rows differ by at most one, such that their numbers add up: row i gets floor((i + 1) k) - floor(i k).
    places = torch.arange(free.shape[-1], device=free.device)
    found = ((places + 1) * high + 1e-9).floor() - (places * high + 1e-9).floor()
    return torch.minimum(free, found.to(free.dtype))


def top_k(scores: torch.Tensor, budget: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """Return the free blocks with the highest scores, `budget` `[..., Qb]` of each row.

    scores `[..., Qb, Kb]`, free bool that broadcasts to it.
    """
    ranked = scores.masked_fill(~free, -math.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, places < budget[..., None])
    return chosen & free


def top_cdf(mass: torch.Tensor, share: float, some: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    """Return the forced blocks, and the fewest others with which they hold `share` of each row's mass.

    mass `[..., Qb, Kb]`, not negative; some and forced bool. The threshold comes from bisection, not from a sort, and blocks
    that tie at it stay. `share` 1 keeps every allowed block with mass above 0.
    """
    if 0 < share < 1 and mass.numel() and native.runs(native.SCORES, mass) and mass.dtype == torch.float32:
        return _compiled(mass, share, some, forced)
    return bisected(mass, share, some, forced)


def _compiled(mass: torch.Tensor, share: float, some: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    """Return what `bisected` does, with sums in float64."""
    operands = [mass.contiguous(), *(x.expand(mass.shape).contiguous() for x in (some, forced))]
    out = torch.empty(mass.shape, dtype=torch.bool)
    shape = [mass.numel() // mass.shape[-1], mass.shape[-1], STEPS, torch.get_num_threads()]
    native.call(native.SCORES, "eff_top_cdf", mass.dtype, shape, [*operands, out], share)
    return out


def bisected(mass: torch.Tensor, share: float, some: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    """Return what `top_cdf` does, by torch operations."""
    mass = mass.masked_fill(~some, 0.0)
    forced = forced & some
    rest = mass.masked_fill(forced, 0.0)
    if share >= 1:
        return (rest > 0) | forced
    missing = share * mass.sum(-1, keepdim=True) - mass.masked_fill(~forced, 0.0).sum(-1, keepdim=True)
    low, high = torch.zeros_like(missing), rest.amax(-1, keepdim=True)
    for _ in range(STEPS):  # the largest threshold at which enough mass is kept
        middle = (low + high) / 2
        enough = rest.masked_fill(rest < middle, 0.0).sum(-1, keepdim=True) >= missing
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    whole = rest.masked_fill(rest < high, 0.0).sum(-1, keepdim=True) >= missing  # the largest block alone is enough
    chosen = rest >= torch.where(whole, high, low)
    return (chosen & (rest > 0) & (missing > 0)) | forced
