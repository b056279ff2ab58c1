"""Check that the package's table is what the stored measurements condense to, and the arithmetic of a curve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.condense import INSTALLED, curve, install_tables, measured, tables
from bench.run import RESULTS
from effcompile.core.errors import EffError
from effcompile.lowering.rates import read

STORED = tables((), RESULTS)


@pytest.mark.parametrize("at", range(len(STORED)))
def test_the_package_has_what_was_measured(at: int) -> None:
    case, document = STORED[at]
    name, part = measured(document)
    assert name == document["machine"]
    installed = json.loads(INSTALLED.read_text())["families"][name]
    assert {key: installed[key] for key in part} == part, f"eff bench {case} --install"


def test_installing_again_changes_nothing_and_keeps_other_machines(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    told = json.loads(INSTALLED.read_text())
    told["families"]["another"] = {"about": "", "gemm": {}, "curves": {}}
    path.write_text(json.dumps(told))
    assert len(install_tables([], RESULTS, path)) == len(STORED)
    assert json.loads(path.read_text()) == told


@given(st.floats(0, 1e-3), st.floats(0.05, 1.0), st.floats(0.3, 1.0))
def test_a_curve_finds_overhead_and_rate(call: float, share: float, factor: float) -> None:
    """Times made from an overhead and one share of the GEMM rate give both back, at every length and head dimension."""
    points = {}
    for length in (32, 128, 512, 2048):
        ideal = 1e-9 * length**2
        points[length, 64] = (call + ideal / share, ideal)
    points[512, 128] = (call + 2e-9 * 512**2 / (share * factor), 2e-9 * 512**2)
    made = curve(points)
    assert made.call == pytest.approx(call, abs=1e-7 + 0.1 * call) or call > 0.9 * points[32, 64][0]
    if made.call == pytest.approx(call, rel=1e-6, abs=1e-12):
        assert made.shares == pytest.approx([share] * 4, rel=1e-3)
        assert made.error == pytest.approx(0, abs=1e-6)
        assert made.share(512, 128) == pytest.approx(share * factor, rel=1e-3)


def test_tables_of_several_machines_are_refused() -> None:
    _, document = tables(["attention-table"], RESULTS)[0]
    (date, *_) = document["runs"]
    run = document["runs"][date]
    mixed = {**document, "runs": {**document["runs"], "2000-01-01": {**run, "threads": 64}}}
    with pytest.raises(EffError) as caught:
        measured(mixed)
    assert caught.value.code == "EFF-B109"


def test_a_case_without_a_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(EffError, match="attention-table") as caught:
        install_tables(["minilm"], tmp_path)
    assert caught.value.code == "EFF-B110"
    with pytest.raises(EffError) as caught:
        install_tables([], tmp_path)
    assert caught.value.code == "EFF-B106"


def test_the_installed_file_can_be_read() -> None:
    families = json.loads(INSTALLED.read_text())["families"]
    assert all(read(name, data).curves for name, data in families.items())
