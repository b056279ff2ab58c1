"""Draw operands for attention kernels, and compare their results with float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draw seeded normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def agree(
    got: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    v: Tensor,
    *,
    scores: float = 8.0,
    largest: float | None = None,
) -> None:
    """Compare (output, LSE) with float64.

    The weights are rounded to v's type and sum to 1, and the output is rounded once more, so the error is a few units in the
    last place of the `largest` value. A score of size `scores` has a float32 error of about that times 2^-23, which the LSE
    carries in full.
    """
    out, lse = got
    assert out.dtype == v.dtype
    assert not out.isnan().any()
    assert torch.equal(lse == -math.inf, exact[1] == -math.inf)
    unit = max(torch.finfo(v.dtype).eps, 2e-6)
    most = largest if largest is not None else float(v.abs().max())
    assert (out.double() - exact[0]).abs().max() <= 2 * unit * most
    there = exact[1] != -math.inf
    if there.any():
        assert (lse.double() - exact[1])[there].abs().max() <= 1e-6 * (scores + float(exact[1][there].abs().max()))
