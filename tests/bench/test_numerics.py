"""Check the error measures and the rule against float64."""

from __future__ import annotations

import torch

from bench.numerics import Reference, max_error, rmse

PRECISE = torch.tensor([1.0, -4.0], dtype=torch.float64)


def test_measures_of_known_vectors() -> None:
    assert max_error(torch.tensor([1.0, -3.0]), PRECISE) == 0.25
    assert abs(rmse(torch.tensor([1.0, -3.0]), PRECISE) - 0.5**0.5) < 1e-12


def test_the_rule_compares_with_eager() -> None:
    eager = PRECISE + torch.tensor([1e-3, 0.0], dtype=torch.float64)
    rule = Reference(PRECISE, eager.float(), "float64", torch.float32)
    same = rule.compare(eager.float())
    assert same["within"] is True
    assert same["reference"] == "float64"
    assert rule.compare((PRECISE + torch.tensor([3e-3, 0.0], dtype=torch.float64)).float())["within"] is False
    narrow = Reference(PRECISE, eager.float(), "float64", torch.bfloat16)
    assert narrow.compare((PRECISE + torch.tensor([3e-3, 0.0], dtype=torch.float64)).float())["within"] is True


def test_a_nan_or_another_shape_is_never_within() -> None:
    rule = Reference(PRECISE, PRECISE.float(), "float64", torch.float32)
    wrong = rule.compare(torch.tensor([1.0, float("nan")]))
    assert wrong["within"] is False
    assert wrong["rmse"] == "nan"
    assert rule.compare(torch.ones(3))["within"] is False


def test_without_a_more_precise_run_the_rule_says_nothing() -> None:
    blind = Reference(PRECISE.float(), PRECISE.float(), "float32", torch.float32)
    assert blind.compare(PRECISE.float() + 1e-3)["within"] is None
    assert blind.compare(torch.tensor([1.0, float("nan")]))["within"] is False
