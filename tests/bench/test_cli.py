"""Check `eff bench`: where it looks, what it refuses, what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import effcompile
from effcompile.cli import bench as verb
from tests.bench.test_store import document
from tests.cli.command import run


def test_without_a_checkout_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(effcompile, "__file__", str(tmp_path / "site-packages" / "effcompile" / "__init__.py"))
    done = run(capsys, "bench", "--list")
    assert done.code == 2
    assert "EFF-B101" in done.err
    assert "clone the repository" in done.err


def test_the_list_names_rows_and_arms(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "bench", "--list", "--json", "--device", "cuda")
    items = {item["case"]: item for item in json.loads(done.out)}
    assert items["dit"]["rows"] == ["4096-float32", "4096-bfloat16"]
    assert "eff-max-autotune" in items["dit"]["arms"]
    assert "linear-table" not in items
    assert "smollm2-prefill" in run(capsys, "bench", "--list").out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("dti", "--quick"), "EFF-B102"),
        (("dit", "--arms", "egaer"), "EFF-B103"),
        (("dit", "--device", "cpo"), "EFF-B105"),
        (("dit", "--lengths", "4k"), "EFF-B108"),
        (("dit", "--dtypes", "bf17"), "EFF-T103"),
        (("dit", "--lenghts", "1"), "EFF-U201"),
    ],
)
def test_wrong_words_are_usage_errors(words: tuple[str, ...], code: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "bench", *words)
    assert done.code == 2
    assert code in done.err


def test_a_quick_run_prints_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(verb.load("run"), "RESULTS", tmp_path)
    done = run(
        capsys, "bench", "dit", "--quick", "--arms", "eager", "--dtypes", "bf16", "--rounds", "1", "--threads", "1"
    )
    assert done.code == 0
    assert "64-bfloat16" in done.out
    assert list(tmp_path.iterdir()) == []
    done = run(
        capsys, "bench", "dit", "--quick", "--arms", "eager", "--dtypes", "fp32", "--out", str(tmp_path), "--json"
    )
    assert json.loads(done.out)[0]["rows"][0]["id"] == "64-float32"
    assert [path.name for path in tmp_path.glob("*/*")] == ["dit.json"]


def test_the_readme_gets_the_stored_results(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from bench import report, store

    monkeypatch.setattr(verb, "checkout", lambda: tmp_path)
    done = run(capsys, "bench", "--readme", "--out", str(tmp_path))
    assert done.code == 2
    assert "EFF-B106" in done.err
    store.write(tmp_path / "chip" / "demo.json", document())
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    assert run(capsys, "bench", "--readme", "--out", str(tmp_path)).code == 0
    assert "### On Chip (avx)\n\n#### Demo" in (tmp_path / "README.md").read_text()
