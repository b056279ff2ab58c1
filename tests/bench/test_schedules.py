"""Check distances between sets of features against closed forms, small runs of every form of the case, and its page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import schedules_report, store
from bench.case import Settings, Watch
from bench.cases.schedules import SEEDS, Schedules
from bench.frechet import distance, interval, moments
from bench.report import BEGIN, END
from bench.schedule_arms import ARMS, fitting
from bench.schedule_replay import Video, ceiling, densities
from bench.schedules_report import at_speed, frontier, markdown
from bench.stats import Spread, ratios
from tests.bench.test_store import facts


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


def test_intervals_and_speeds() -> None:
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == pytest.approx((3.0, 2.776 * (2.5 / 5) ** 0.5))
    assert interval([2.0])[1] == float("inf")
    plain = ((4.0, 8.0), (1.0, 2.0))
    assert at_speed(plain, 2.0) == pytest.approx(5.0)
    assert at_speed(plain, 0.5) == 2.0
    assert at_speed(plain, 9.0) == 8.0


def test_rows_are_forms_and_seeds() -> None:
    case = Schedules()
    rows = case.rows(Settings(forms=("quality-32", "times-8")))
    assert [row.id for row in rows] == [*(f"quality-32-seed-{seed}" for seed in SEEDS), "times-8"]
    assert [row.id for row in case.rows(Settings(forms=("quality-8",), lengths=(3,)))] == ["quality-8-seed-3"]
    assert set(ARMS) < set(case.arms("cpu"))
    assert "x0-taylor-3" not in fitting(tuple(ARMS), 8)
    assert fitting(tuple(ARMS), 32) == list(ARMS)


def test_the_ceiling_is_that_of_the_published_schedule() -> None:
    """Of 50 steps 15 are dense and 7 refresh: 0.44 + 0.70 d (specification of the method's run)."""
    for density in (0.0, 0.06, 1.0):
        assert ceiling(Video(), density) == pytest.approx(0.44 + 0.70 * density)
    known = densities(Video(places=1350))
    assert known["pairs"] == pytest.approx(0.056, abs=0.004)  # counted on 128 rows
    assert known["blocks"] == pytest.approx(0.0614, abs=0.0005), "in blocks of 24 queries and 32 keys"


@pytest.mark.slow
def test_times_and_quality_run() -> None:
    arms = ("euler-28", "euler-5", "taylor-4", "reuse-body-3")
    settings = Settings(quick=True, rounds=2, warmup=0, threads=1, arms=arms, forms=("times-8", "quality-8"))
    case = Schedules(batch=20)
    found = [case.measure(row, settings, Watch())[0] for row in case.rows(settings)]
    timed, drawn = (row["arms"] for row in found)
    assert timed["euler-28"]["computed"] == 28
    assert timed["taylor-4"]["full_steps"] < 12
    assert drawn["euler-28"]["apart"] == 0
    assert 0 < drawn["taylor-4"]["apart"] < drawn["euler-5"]["apart"]
    assert found[1]["real"] > 0
    assert all(arm["frechet"] > 0 for arm in drawn.values())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["estimate-dit-xl", "estimate-cogvideox", "replay"])
def test_estimates_and_the_replay_run(form: str) -> None:
    if form == "estimate-cogvideox":
        pytest.importorskip("diffusers")
    sizes = {
        "dit-xl": {"layers": 1, "width": 64, "heads": 2},
        "cogvideox": {"layers": 1, "heads": 1, "frames": 2, "height": 8, "width": 8},
        "replay": {"heads": 1, "text": 4, "frames": 3, "places": 100, "steps": 20},
    }
    settings = Settings(quick=True, rounds=1, warmup=0, threads=1, forms=(form,))
    case = Schedules(sizes=sizes)
    (row,) = case.rows(settings)
    (found,) = case.measure(row, settings, Watch())
    if form == "replay":
        arm = found["arms"]["re-ttention"]
        assert set(arm["step_seconds"]) == {"dense", "refresh", "sparse"}
        assert arm["share"]["median"] > 0
        assert arm["state_bytes"] == 304 * (64 + 1) * 4
    else:
        assert found["arms"]["bottleneck-2-6-4"]["full_steps"] < 12
        assert all(arm["over_estimate"]["measured"]["median"] > 0 for arm in found["arms"].values())


def document() -> dict[str, Any]:
    """Return results of two plain arms and two others, of two seeds."""
    made = store.empty("schedules", "Title", "About it.", "call", "cpu", "chip")
    made["runs"]["then"] = facts("2030-01-01T00:00:00+00:00")
    seconds = {"euler-28": 8.0, "euler-7": 2.0, "x0-taylor-3": 2.0, "correlated": 4.0}
    spreads = {name: Spread((value, value)) for name, value in seconds.items()}
    plain = {"euler-28": True, "euler-7": True, "x0-taylor-3": False, "correlated": False}

    def row(form: str, arms: dict[str, Any], found: list[Any], **more: Any) -> dict[str, Any]:
        given = {"form": form, **more.pop("parameters", {})}
        return {"id": form, "parameters": given, "rounds": 2, "arms": arms, "ratios": found, "run": "then", **more}

    timed = {
        name: {"seconds": spread.to_json(), "policy": name, "plain": plain[name]} for name, spread in spreads.items()
    }
    made["rows"] = [row("times-32", timed, ratios(spreads, ("euler-28",), ()))]
    for seed, shift in ((1, 0.0), (2, 0.2)):
        distances = {"euler-28": 1.0, "euler-7": 3.0, "x0-taylor-3": 2.5 + shift, "correlated": 2.5}
        arms = {name: {**timed[name], "frechet": value + shift} for name, value in distances.items()}
        given = {"parameters": {"samples": 2000, "seed": seed}, "real": 0.5}
        made["rows"].append({**row("quality-32", arms, [], **given), "id": f"quality-32-seed-{seed}"})
    return made


def test_the_frontier_holds_arms_against_plain_steps_of_the_same_time() -> None:
    points = {point.name: point for point in frontier(document(), "32")}
    assert list(points) == ["euler-28", "correlated", "euler-7", "x0-taylor-3"]
    assert points["x0-taylor-3"].speed == 4
    assert points["x0-taylor-3"].excess == pytest.approx((-0.5, -0.3))
    assert points["x0-taylor-3"].no_worse
    assert points["correlated"].at_equal_time == pytest.approx(2.1)  # between 1 and 3, and 0.1 for the seeds
    assert points["correlated"].excess == pytest.approx((0.5, 0.5))
    assert not points["correlated"].no_worse
    assert points["euler-7"].half == pytest.approx(12.706 * 0.1)
    assert frontier(document(), "8") == []


def test_the_page_has_the_frontier_the_estimates_and_the_replay(tmp_path: Path) -> None:
    held = document()
    over = {"measured": {"median": 1.02}, "modelled": {"median": 0.94}}
    shaped = {"policy": "plain{steps=10}", "seconds": Spread((3.0,)).to_json(), "over_estimate": over}
    replay = {
        "policy": "re-ttention",
        "share": {"median": 0.5},
        "ceiling": {"pairs": 0.48, "blocks": 0.49},
        "density": {"pairs": 0.05, "blocks": 0.07},
    }
    for form, arms, more in (
        ("estimate-dit-xl", {"plain-10": shaped}, {"scaled": "4 layers of 28"}),
        ("replay", {"re-ttention": replay}, {}),
    ):
        held["rows"].append({"id": form, "parameters": {"form": form}, "arms": arms, "run": "then", **more})
    text = markdown([held])
    assert "| `x0-taylor-3` | 4.00x | 2 | 2.700 ± 2.541 | 3.100 | -0.400 ± 1.271 |" in text
    assert "| `plain{steps=10}` | 3.00 s | 1.020 | 0.940 |" in text
    assert "takes 0.500 of the time" in text
    assert "0.44 + 0.56 d: 0.468 and 0.479." in text
    timed = {**held, "about": "Of another machine.", "rows": held["rows"][:1]}
    assert markdown([held, timed]) == text, "speeds alone are no row of the page"
    assert "### Digits of 32 x 32: 2,000 samples" in text
    both = markdown([held, {**document(), "machine": "another"}])
    assert all(f"### Digits of 32 x 32 on {name}: 2,000 samples" in both for name in ("chip", "another"))
    (tmp_path / schedules_report.PAGE).write_text(f"{BEGIN}\n{END}\n")
    assert schedules_report.write(tmp_path, [held])
    assert (tmp_path / schedules_report.PICTURE).stat().st_size > 1000
    assert not schedules_report.write(tmp_path, [held])
    assert math.isinf(interval([1.0])[1])
