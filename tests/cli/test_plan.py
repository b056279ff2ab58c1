"""Check `eff plan`, `eff show` and `eff diff`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effcompile.core.plan import Plan
from tests.cli.command import run


def make(capsys: pytest.CaptureFixture[str], out: Path, *more: object) -> Path:
    assert run(capsys, "plan", "zoo:llama-tiny", "--target", "cpu", "-o", out, *more).code == 0
    return out


def test_a_plan_survives_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(capsys, tmp_path / "plan.json")
    told = run(capsys, "plan", "zoo:llama-tiny", "--target", "cpu", "--json").value
    plan = Plan.read(path)
    assert plan.hash == told["hash"] == json.loads(path.read_text())["hash"]
    assert {site for site, _ in plan.fingerprints} == {"layers.0.attn", "layers.1.attn"}
    assert {choice.policy for choice in plan.choices if choice.family == "attention-kernel"} == {"sdpa-causal"}


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(capsys, tmp_path / "plan.json")
    brief, whole = run(capsys, "show", path), run(capsys, "show", path, "--why-not")
    assert "layers.{0-1}.attn" in brief.out
    assert "EFF-A208" not in brief.out
    assert "EFF-A208" in whole.out
    assert "declined" not in run(capsys, "show", path, "--json").value
    assert run(capsys, "show", path, "--json", "--why-not").value["declined"]


def test_diff_of_equal_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = make(capsys, tmp_path / "1.json"), make(capsys, tmp_path / "2.json")
    assert run(capsys, "diff", one, other).code == 0
    assert run(capsys, "diff", one, other, "--json").value == {"equal": True, "changes": []}


def test_diff_names_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make(capsys, tmp_path / "1.json")
    other = make(capsys, tmp_path / "2.json", "--shape", "s=64", "--option", "disable=select-linear")
    done = run(capsys, "diff", one, other, "--json")
    assert done.code == 1
    changes = {(c["site"], c["what"]): (c["old"], c["new"]) for c in done.value["changes"]}
    assert changes["graph", "pass select-linear"] == ("runs", "-")
    assert {site for site, what in changes if what == "site"} == {"layers.0.attn", "layers.1.attn"}
    shown = run(capsys, "diff", one, other)
    assert shown.code == 1
    assert "planned" in shown.out
    assert {c["reason"] for c in done.value["changes"] if c["site"] == "graph"} == {"EFF-U010 disabled by the user"}


def test_diff_of_an_edited_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make(capsys, tmp_path / "1.json")
    told = json.loads(one.read_text())
    told["choices"][0]["policy"] = "dense"
    edited = tmp_path / "2.json"
    edited.write_text(json.dumps(told))
    assert "EFF-P503" in run(capsys, "diff", one, edited).err
    edited.write_text(json.dumps({**told, "hash": ""}))
    (change,) = run(capsys, "diff", one, edited, "--json").value["changes"]
    assert (change["site"], change["old"], change["new"]) == ("layers.0.attn", "sdpa-causal", "dense")


def test_a_model_in_pieces_has_no_single_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "plan", "tests.cli.samples:broken_graph", "-o", tmp_path / "plan.json")
    assert done.code == 2
    assert "EFF-P504" in done.err
    assert "samples.py" in done.err
    assert not (tmp_path / "plan.json").exists()


def test_a_broken_contract_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "tests.cli.samples:broken_graph", "-o", tmp_path / "plan.json", "--require", "attention=all")
    assert run(capsys, *words).code == 3
    assert not (tmp_path / "plan.json").exists()
