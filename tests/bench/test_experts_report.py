"""Check the tables of mixture-of-experts blocks, and that they go between the page's markers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import experts_report, store
from bench.report import BEGIN, END
from effcompile.core.errors import EffError
from tests.bench.test_store import facts

THEN = "2030-01-01T00:00:00+00:00"


def _row(length: int, ratio: float, **arms: dict[str, Any]) -> dict[str, Any]:
    ratios = [{"arm": "eff", "to": name, "median": ratio} for name in arms if name != "eff"]
    given = {"form": "mixtral", "length": length, "dtype": "float32"}
    return {"id": f"{length}-mixtral", "run": THEN, "parameters": given, "rounds": 5, "arms": arms, "ratios": ratios}


def _arm(seconds: float, share: float, **more: float) -> dict[str, Any]:
    return {"seconds": {"median": seconds}, "share_of_gemm": share, **more}


def document() -> dict[str, Any]:
    made = store.empty("moe", "Blocks", "About them.", "call", "cpu", "chip")
    made["runs"][THEN] = facts(THEN)
    made["rows"] = [
        _row(2048, 1.5, eager=_arm(0.3, 0.3), loop=_arm(0.15, 0.6), eff=_arm(0.1, 0.9)),
        _row(1, 1.1, eager=_arm(0.011, 0.3), eff=_arm(0.01, 0.01, times_copy=1.7), absent={"skipped": "too large"}),
    ]
    return made


def test_each_row_names_the_fastest_other_and_the_limit_that_counts() -> None:
    lines = experts_report.markdown([document()]).splitlines()
    assert "| mixtral | 2,048 | 100 ms | 150 ms loop | 1.50x | 90 % |  |" in lines
    assert "| mixtral | 1 | 10 ms | 11 ms eager | 1.10x |  | 1.70 |" in lines
    assert "1.2x or more of the fastest other in 1 of 2 rows." in lines
    assert lines.index("### Blocks") < lines.index("#### float32, Chip (avx)")


def test_text_outside_the_markers_stays(tmp_path: Path) -> None:
    page = tmp_path / "experts.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    assert experts_report.write(tmp_path, [document()])
    assert not experts_report.write(tmp_path, [document()])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    page.unlink()
    with pytest.raises(EffError, match="EFF-B104"):
        experts_report.write(tmp_path, [document()])
