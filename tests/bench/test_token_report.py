"""Check the tables and the curve of policies that work on fewer tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import store, token_report
from bench.report import BEGIN, END
from bench.token_arms import chosen, points
from effcompile.core.errors import EffError
from tests.bench.test_store import facts


def _document(case: str, arms: dict[str, Any], ratios: list[dict[str, Any]], **given: Any) -> dict[str, Any]:
    made = store.empty(case, "Title", "About it.", "call", "cpu", "chip")
    made["runs"]["then"] = facts("2030-01-01T00:00:00+00:00")
    row = {"id": case, "parameters": given, "rounds": 2, "arms": arms, "ratios": ratios, "run": "then"}
    made["rows"] = [row]
    return made


def documents() -> list[dict[str, Any]]:
    base = {"accuracy": 0.95, "points": 0.0, "points_low": 0.0, "points_high": 0.0, "cosine": 1.0, "cosine_5": 1.0}
    merged = {
        "accuracy": 0.948,
        "points": -0.2,
        "points_low": -0.5,
        "points_high": 0.1,
        "cosine": 0.97,
        "cosine_5": 0.9,
    }
    images = {
        "exact": {"seconds": {"median": 1.0}, "policy": "", "images_per_second": 8.0, "quality": base},
        "tome-0.5": {
            "seconds": {"median": 0.5},
            "policy": "tome{ratio=0.5}",
            "images_per_second": 16.0,
            "quality": merged,
        },
    }
    texts = {
        "dense": {"seconds": {"median": 9.0}, "policy": "", "pass_key": {"found": 20, "tries": 20}},
        "fastv": {"seconds": {"median": 6.0}, "policy": "fastv", "pass_key": {"found": 3, "tries": 20}},
    }
    return [
        _document("tokens-smollm2", texts, [{"arm": "fastv", "to": "dense", "median": 1.5}], form="pass-key"),
        _document("tokens-dinov2", images, [{"arm": "tome-0.5", "to": "exact", "median": 2.0}], images=2048),
    ]


def test_each_row_shows_speed_and_what_it_costs() -> None:
    lines = token_report.markdown(documents()).splitlines()
    assert lines[0].endswith(f"({token_report.PICTURE})")
    assert "| policy | images/s | over exact | accuracy | points (95 %) | cosine | cosine, 5 % quantile |" in lines
    assert "| exact | 8.0 | 1.00x | 95.00 % | - | 1.0000 | 1.0000 |" in lines
    assert "| `tome{ratio=0.5}` | 16.0 | 2.00x | 94.80 % | -0.20 (-0.50 to +0.10) | 0.9700 | 0.9000 |" in lines
    assert "| `fastv` | 6.00 s | 1.50x | 3 of 20 |" in lines
    titles = [line for line in lines if line.startswith("###")]
    assert len(titles) == 2
    assert lines.index("images 2048:") < lines.index("form pass-key:")


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    ((_, points),) = token_report.panels(documents())
    assert points == [("tome", "ratio=0.5", 2.0, -0.2, -0.5, 0.1)]
    assert token_report.draw(documents(), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert not token_report.draw(documents()[:1], tmp_path / "b.png")


def test_the_page_changes_between_its_markers_only(tmp_path: Path) -> None:
    with pytest.raises(EffError, match="EFF-B104"):
        token_report.write(tmp_path, documents())
    (tmp_path / token_report.PAGE).write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    assert token_report.write(tmp_path, documents())
    text = (tmp_path / token_report.PAGE).read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert not token_report.write(tmp_path, documents())


def test_points_are_of_paired_differences() -> None:
    """Of 100 answers 1 became wrong: -1 point; the interval is that of the differences, not of two accuracies."""
    base = torch.ones(100, dtype=torch.bool)
    right = base.clone()
    right[0] = False
    told = points(right, base)
    assert told["accuracy"] == 0.99
    assert told["points"] == -1.0
    assert told["points_high"] - told["points"] == pytest.approx(1.96, abs=1e-3)
    assert points(base, base)["points_low"] == 0.0


def test_baselines_come_first_and_always() -> None:
    assert chosen(("b", "a"), ("a",), None) == ["a", "b"]
    assert chosen(("b", "c"), ("a",), ("c",)) == ["a", "c"]
