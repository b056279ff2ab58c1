"""Resize latents along height and width by two small matrices, in float32.

torch has no Lanczos kernel. A matrix for each edge gives every kernel in one form, runs on any device, and exports as two products.
Pixel centers lie at half steps; where the picture shrinks a kernel widens by the ratio, so that nothing aliases. Rows sum to 1.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from effcompile.core.schedule import Resampling


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _bicubic(x: Tensor) -> Tensor:
    """Return Keys' cubic with a = -0.5, as Pillow has it."""
    a, x = -0.5, x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _lanczos3(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), torch.zeros_like(x))


_KERNELS = {"bilinear": _bilinear, "bicubic": _bicubic, "lanczos3": _lanczos3}


@functools.cache
def resize_matrix(source: int, target: int, kernel: Resampling) -> Tensor:
    """Return the float64 matrix `[target, source]` that resamples an edge."""
    ratio = source / target
    centers = (torch.arange(target, dtype=torch.float64) + 0.5) * ratio
    places = torch.arange(source, dtype=torch.float64) + 0.5
    if kernel == "nearest":
        return (centers.floor().clamp(max=source - 1)[:, None] == torch.arange(source)[None, :]).double()
    weights = _KERNELS[kernel]((places[None, :] - centers[:, None]) / max(1.0, ratio))
    return weights / weights.sum(1, keepdim=True)


def resize(x: Tensor, height: int, width: int, kernel: Resampling = "lanczos3") -> Tensor:
    """Return x `[..., H, W]` as `[..., height, width]` in float32; the same tensor's values where the size stays."""
    wide = x.float()
    for dim, target in ((-2, height), (-1, width)):
        if x.shape[dim] == target:
            continue
        matrix = resize_matrix(x.shape[dim], target, kernel).to(device=x.device, dtype=torch.float32)
        wide = matrix @ wide if dim == -2 else wide @ matrix.T
    return wide


def cell_noise(noise: Tensor, z: float) -> Tensor:
    """Return noise `[..., H, W]` of covariance I - 11^T / z^2 within each 2 x 2 cell, from white noise of the same shape.

    The mean over a cell keeps the share sqrt(1 - 4 / z^2) of its deviation, what differs from it stays. z = 2 takes the mean away.
    """
    *lead, height, width = noise.shape
    cells = noise.reshape(*lead, height // 2, 2, width // 2, 2)
    mean = cells.mean(dim=(-3, -1), keepdim=True)
    return (cells - mean * (1 - math.sqrt(max(0.0, 1 - 4 / z**2)))).reshape(noise.shape)
