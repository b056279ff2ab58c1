"""Check the matrices that resize latents: rows sum to 1, known kernels are torch's, noise of a cell has its covariance."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from effcompile.runtime.resize import cell_noise, resize, resize_matrix

KERNELS = ("nearest", "bilinear", "bicubic", "lanczos3")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("source", "target"), [(16, 8), (8, 16), (9, 13), (13, 5), (1, 4)])
def test_a_constant_stays_what_it_is(kernel: str, source: int, target: int) -> None:
    matrix = resize_matrix(source, target, kernel)
    assert matrix.shape == (target, source)
    assert torch.allclose(matrix.sum(1), torch.ones(target, dtype=torch.float64), atol=1e-12)
    flat = resize(torch.full((2, 3, source, source), 0.7), target, target, kernel)
    assert (flat - 0.7).abs().max() < 1e-6


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("source", "target"), [(16, 8), (8, 16), (12, 7)])
def test_kernels_that_torch_has_agree_with_it(kernel: str, source: int, target: int) -> None:
    x = torch.randn(1, 2, source, source + 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # torch's antialiased kernels are Pillow's (a = -0.5); they cut the kernel off at the border as we do.
    expected = F.interpolate(x, size=(target, target + 2), mode=kernel, antialias=True, align_corners=False)
    assert (resize(x, target, target + 2, kernel) - expected).abs().max() < 2e-6


def test_nearest_twice_repeats_and_lanczos_keeps_a_wave() -> None:
    x = torch.randn(1, 1, 4, 4)
    assert torch.equal(resize(x, 8, 8, "nearest"), x.repeat_interleave(2, -1).repeat_interleave(2, -2))
    places = (torch.arange(64) + 0.5) / 64
    wave = torch.sin(2 * torch.pi * 3 * places).expand(64, 64)[None, None]
    finer = torch.sin(2 * torch.pi * 3 * (torch.arange(128) + 0.5) / 128)
    inside = resize(wave, 128, 128)[0, 0, 64, 12:-12]
    assert (inside - finer[12:-12]).abs().max() < 0.01
    assert resize(x, 4, 4) is x, "no size changes, nothing is computed"


@pytest.mark.parametrize("z", [2.0, 3.0, 6.317])
def test_noise_of_a_cell_has_its_covariance(z: float) -> None:
    noise = torch.randn(200_000, 2, 2, generator=torch.Generator().manual_seed(1))
    cells = cell_noise(noise, z).reshape(-1, 4).double()
    expected = torch.eye(4, dtype=torch.float64) - 1 / z**2
    # The standard error of an entry is at most sqrt(2 / n).
    assert (cells.T @ cells / len(cells) - expected).abs().max() < 4 * (2 / len(cells)) ** 0.5
