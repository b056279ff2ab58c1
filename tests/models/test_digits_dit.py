"""Check the trained denoisers of digits: what they sample is judged to be the digit that was asked for, at each size they know."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import effcompile as eff
from bench.frechet import distance, moments
from effcompile.models import dit, zoo
from effcompile.models.trained_digits_dit import HELD_OUT, NONE, config, digits, judge, weights


def sample(edge: int, size: int, steps: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return (images, the labels that were asked for)."""
    labels = torch.arange(count) % NONE
    of = eff.Denoising((size, size), shift=max(1.0, size / 16))
    sampler = eff.sampler(zoo.load(f"digits-dit-{edge}").model, of, schedule=f"plain{{steps={steps}}}")
    return sampler((count, 1), labels, generator=torch.Generator().manual_seed(seed)), labels


def judged(images: Tensor, labels: Tensor, edge: int) -> float:
    """Return the share of images that the judge takes for what they should be."""
    with torch.no_grad():
        return float((judge(edge)(images).argmax(1) == labels).float().mean())


def test_the_weights_are_small_and_load_in_every_dtype() -> None:
    for name in ("digits-dit-8", "digits-dit-32", "judge-8", "judge-32"):
        assert weights(name).stat().st_size < 2_000_000
    for edge in (8, 32):
        exact = zoo.load(f"digits-dit-{edge}", dtype=torch.float64)
        args, _ = exact.example_inputs(2)
        with torch.no_grad():
            expected = exact.model(*args)
        for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
            other = zoo.load(f"digits-dit-{edge}", dtype=dtype)
            with torch.no_grad():
                error = other.model(*other.example_inputs(2)[0]).double() - expected
            assert error.norm() < most * expected.norm()


def test_digits_of_eight_pixels_are_what_was_asked_for() -> None:
    images, labels = sample(8, 8, 8, 200)
    assert judged(images, labels, 8) > 0.9
    assert judged(torch.randn_like(images), labels, 8) < 0.4, "noise is no digit"
    real, _ = digits(8)
    with torch.no_grad():
        seen = judge(8)
        features = moments(seen.features(real[:-HELD_OUT]))
        near = distance(moments(seen.features(images)), features)
        far = distance(moments(seen.features(torch.randn_like(images))), features)
    assert near < far / 5


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 32])
def test_the_larger_one_knows_both_of_its_sizes(size: int) -> None:
    images, labels = sample(32, size, 10, 60)
    assert judged(torch.nn.functional.interpolate(images, size=(32, 32)), labels, 32) > 0.7


def test_positions_of_a_smaller_size_span_the_same_range() -> None:
    model = dit.DiT(config(32))
    assert model.positions.shape == (256, 96)
    assert model.positions_16.shape == (64, 96)
    # Every place of the small grid lies between two of the large one.
    between = dit.grid_positions(8, 96, 16)
    assert torch.equal(between, model.positions_16)
    assert torch.equal(dit.grid_positions(16, 96, 16), model.positions)
    wave = dit.sinusoid((torch.arange(8) + 0.5) * 2 - 0.5, 48)
    assert torch.allclose(between.reshape(8, 8, 96)[:, 0, :48], wave)
    assert torch.allclose(between.reshape(8, 8, 96)[0, :, 48:], wave)


@pytest.mark.parametrize("first", [1, 3])
def test_regions_are_the_model(first: int) -> None:
    loaded = zoo.load("digits-dit-8")
    args, _ = loaded.example_inputs(2)
    model = loaded.model
    assert isinstance(model, dit.DiT)
    parts = eff.Regions(*dit.regions(model, first))
    with torch.no_grad():
        assert torch.equal(parts(*args), model(*args))
        _, _, probe = parts.head(*args)
    assert probe is not None
    assert float(probe.abs().mean()) > 0
