"""Check distances between sets of features against closed forms, and one small run of the case."""

from __future__ import annotations

import pytest
import torch

from bench.case import Settings, Watch
from bench.cases.schedules import ARMS, Schedules, at_time
from bench.frechet import distance, interval, moments


def test_the_distance_of_gaussians_is_that_of_the_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    mean, other = torch.randn(4, generator=draw).double(), torch.randn(4, generator=draw).double()
    # Covariances that commute: the root of the product is the product of the roots.
    one, two = torch.tensor([1.0, 2, 3, 4]).double(), torch.tensor([4.0, 1, 9, 0.5]).double()
    expected = (mean - other).square().sum() + (one.sqrt() - two.sqrt()).square().sum()
    assert distance((mean, one.diag()), (other, two.diag())) == pytest.approx(float(expected))
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=draw).double())
    turned = [turn @ x.diag() @ turn.T for x in (one, two)]
    assert distance((turn @ mean, turned[0]), (turn @ other, turned[1])) == pytest.approx(float(expected))
    features = torch.randn(5000, 3, generator=draw) * 2 + 1
    found = moments(features)
    assert distance(found, found) == pytest.approx(0, abs=1e-9)
    assert torch.allclose(found[1], 4 * torch.eye(3).double(), atol=0.3)


def test_intervals_and_times() -> None:
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == pytest.approx((3.0, 2.776 * (2.5 / 5) ** 0.5))
    assert interval([2.0])[1] == float("inf")
    plain = ((1.0, 8.0), (4.0, 2.0))
    assert at_time(plain, 2.0) == pytest.approx(5.0, abs=1e-5)
    assert at_time(plain, 0.5) == 8.0
    assert at_time(plain, 9.0) == 2.0


@pytest.mark.slow
def test_the_case_runs() -> None:
    shown = {name: ARMS[name] for name in ("euler-28", "euler-5", "taylor-4", "reuse-body-3")}
    settings = Settings(quick=True, rounds=2, threads=1)
    case = Schedules(shown=shown, batch=20)
    (row,) = case.rows(settings)
    (found,) = case.measure(row, settings, Watch())
    arms = found["arms"]
    assert arms["euler-28"]["computed"] == 28
    assert arms["taylor-4"]["full_steps"] < 12
    assert arms["euler-28"]["apart"] == 0
    assert 0 < arms["taylor-4"]["apart"] < arms["euler-5"]["apart"]
    assert found["real"] > 0
