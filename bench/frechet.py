"""Say how far two sets of features are apart: the Frechet distance of the Gaussians that fit them (arXiv:1706.08500)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Moments = tuple[Tensor, Tensor]

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def moments(features: Tensor) -> Moments:
    """Return (mean `[D]`, covariance `[D, D]`) of features `[N, D]`, in float64."""
    wide = features.double()
    return wide.mean(0), torch.cov(wide.T)


def distance(one: Moments, other: Moments) -> float:
    """Return |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))."""
    root = _root(one[1])
    mixed = torch.linalg.eigvalsh(root @ other[1] @ root).clamp(min=0).sqrt().sum()
    apart = (one[0] - other[0]).square().sum()
    return float(apart + one[1].trace() + other[1].trace() - 2 * mixed)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return (mean, half of its 95 % interval) over seeds; the half is infinite for one."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return mean, math.inf
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return mean, spread * _STUDENT[min(count - 1, len(_STUDENT)) - 1]
