"""Check the tables of compressed caches, and that they go between the page's markers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import cache_report, store
from bench.report import BEGIN, END
from effcompile.core.errors import EffError
from tests.bench.test_store import facts


def _row(form: str, **arms: dict[str, Any]) -> dict[str, Any]:
    ratios = [{"arm": "int8", "to": "static-inductor", "median": 4.0}]
    given = {"form": form, "length": 8192, "dtype": "float32"}
    return {"id": form, "parameters": given, "rounds": 5, "arms": arms, "ratios": ratios}


def _seconds(value: float) -> dict[str, Any]:
    return {"seconds": {"median": value}}


def document() -> dict[str, Any]:
    made = store.empty("kv-decode", "Caches", "About them.", "token", "cpu", "chip")
    packed = {"policy": "int8-per-token", "bytes": 97_000_000, "bytes_ratio": 0.5156}
    made["runs"]["then"] = facts("2030-01-01T00:00:00+00:00")
    made["rows"] = [
        _row(
            "speed",
            **{"static-inductor": _seconds(0.3) | {"policy": "", "bytes": 377_000_000, "bytes_ratio": 2.0}},
            int8=_seconds(0.075) | packed,
            absent={"skipped": "not installed"},
        ),
        _row(
            "quality",
            int8=_seconds(0.1) | packed | {"quality": {"pydoc": {"kl": 0.0008, "top1": 0.991, "perplexity": 9.1}}},
        ),
        _row("generate", int8=_seconds(0.1) | {"generate": {"prompts": 10, "tokens": 128, "equal_prompts": 9}}),
    ]
    return made


def test_each_form_shows_the_columns_that_it_has() -> None:
    lines = cache_report.markdown([document()]).splitlines()
    assert "| cache | a token | against static-inductor | MB | bytes against bfloat16 |" in lines
    assert "| static-inductor | 300 ms | 1.00x | 377.0 | 2.000 |" in lines
    assert "| `int8-per-token` | 75 ms | 4.00x | 97.0 | 0.516 |" in lines
    assert any(line.endswith("| 0.0008 | 99.1 % | 9.10 |") for line in lines)
    assert any(line.endswith("| 9 of 10, 128 tokens each |") for line in lines)
    assert not any("absent" in line for line in lines)
    assert any(line.startswith("measured: 2030-01-01, Chip (avx)") for line in lines)
    assert lines[-1].endswith(f"({cache_report.PICTURE})")


def test_the_picture_has_what_the_rows_say(tmp_path: Path) -> None:
    """Bytes and quality of one form, speed of another; a document without qualities has no picture."""
    (point,) = cache_report.curve(document()["rows"])
    assert point == ("int8", 0.5156, 0.0008, 4.0)
    assert cache_report.draw([document()], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    nothing = document() | {"rows": document()["rows"][:1]}
    assert not cache_report.draw([nothing], tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_the_page_changes_between_its_markers_only(tmp_path: Path) -> None:
    page = tmp_path / cache_report.PAGE
    with pytest.raises(EffError, match="EFF-B104"):
        cache_report.write(tmp_path, [document()])
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert cache_report.write(tmp_path, [document()])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert not cache_report.write(tmp_path, [document()])
