"""Check the tables, and the replacement between the README's markers."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import report
from effcompile.cli.console import stdout
from effcompile.core.errors import EffError
from tests.bench.test_store import document


def test_markdown_has_figures_ratios_tags_and_reasons() -> None:
    text = report.markdown([document()])
    lines = text.splitlines()
    header = next(line for line in lines if line.startswith("| row"))
    assert header == "| row | eager | inductor | eff | onnxruntime | openvino | against the fastest peer |"
    assert "| a | 4000 ms | 2000 ms (2.00x) | 1000 ms (4.00x) | failed [1] | - [2] | 2.00x inductor |" in lines
    assert "| b | 4 ms | 2 ms (2.00x) | 1 ms (4.00x) | failed [1] | - [2] | 2.00x inductor |" in lines
    assert "[1] no / kernel &lt;for it>  " in text
    assert "measured: 2030-01-01, Chip (avx), 2 threads, torch 2.13.0, commit abcdef0123" in text


def test_runs_that_differ_in_the_commit_alone_share_a_line() -> None:
    made = document()
    first = next(iter(made["runs"].values()))
    made["runs"]["later"] = first | {"commit": {"hash": "1234567890abc", "modified": True}}
    made["runs"]["again"] = made["runs"]["later"]
    made["runs"]["other"] = first | {"date": "2030-03-03T00:00:00+00:00"}
    assert report.circumstances(made) == [
        "2030-01-01, Chip (avx), 2 threads, torch 2.13.0, commits abcdef0123, 1234567890+",
        "2030-03-03, Chip (avx), 2 threads, torch 2.13.0, commit abcdef0123",
    ]


def test_tables_of_kernels_stay_out_of_the_readme() -> None:
    assert "Demo" not in report.markdown([document() | {"headline": False}])


def test_an_inexact_arm_is_marked_everywhere() -> None:
    made = document()
    made["rows"][0]["arms"]["eff"]["numerics"] = {"within": False, "rmse": 1.0}
    assert "differs from float64" in report.section(made)
    assert report.failures(made) == ["a"]
    assert any("differs from float64" in line and "(a)" in line for line in report.problems(made))
    assert report.failures(document()) == []


def test_problems_are_told_once_with_their_rows() -> None:
    found = report.problems(document())
    assert found == ["onnxruntime failed: no | kernel <for it> (a, b)", "openvino skipped: other dtype (a, b)"]


def test_the_terminal_table_prints(capsys: pytest.CaptureFixture[str]) -> None:
    stdout().print(report.table(document()))
    printed = capsys.readouterr().out
    assert "4000 ms ±0%" in printed
    assert "2.00x inductor" in printed


def test_amounts_have_units() -> None:
    assert report.amount("bytes", {"bytes": {"call_peak": 3 * 2**29}}) == "1.50 GiB"
    assert report.amount("compilation", {"seconds": {"median": 9.26}}) == "9.3 s"
    assert report.amount("call", {"seconds": {"median": 12.34}}) == "12.3 s"
    assert report.amount("token", {"seconds": {"median": 0.01234}}) == "12.3 ms"
    assert report.amount("token", {"seconds": {"median": 0.01234}, "bytes": 65536}) == "12.3 ms"
    assert report.amount("call", {"seconds": {"median": 1.0}, "gflops": 123.456}) == "123.5 GFLOP/s"


def test_the_readme_changes_between_its_markers_only(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.write_readme(path, [document()])
    text = path.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in text
    assert "### Demo" in text
    assert not report.write_readme(path, [document()])


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END}{report.BEGIN}", report.BEGIN * 2 + report.END])
def test_a_readme_without_its_markers_is_an_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(EffError, match="needs the line") as caught:
        report.replace_results(text, "x")
    assert caught.value.code == "EFF-B104"
    with pytest.raises(EffError, match="cannot read"):
        report.write_readme(tmp_path / "README.md", [])
