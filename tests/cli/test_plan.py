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
    assert "declined" not in run(capsys, "show", path, "--json").value["graphs"][0]
    assert run(capsys, "show", path, "--json", "--why-not").value["graphs"][0]["declined"]


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
    told["graphs"][0]["choices"][0]["policy"] = "dense"
    edited = tmp_path / "2.json"
    edited.write_text(json.dumps(told))
    assert "EFF-P503" in run(capsys, "diff", one, edited).err
    edited.write_text(json.dumps({**told, "hash": ""}))
    (change,) = run(capsys, "diff", one, edited, "--json").value["changes"]
    assert (change["site"], change["old"], change["new"]) == ("layers.0.attn", "sdpa-causal", "dense")


def test_a_model_in_several_graphs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    done = run(capsys, "plan", "tests.cli.samples:broken_graph", "-o", path)
    assert done.code == 0
    for shown in (done.out, run(capsys, "show", path).out):
        assert "1 site in 2 graphs" in shown
        assert "layers.{0,2}" in shown
        assert "graph {0-1}" in shown  # both run the same passes
    assert "EFF-A203" in run(capsys, "show", path, "--why-not").out
    assert run(capsys, "diff", path, path).code == 0
    told = json.loads(path.read_text())
    kernel = next(c for graph in told["graphs"] for c in graph["choices"] if c["family"] == "attention-kernel")
    kernel["policy"] = "blocked"
    told["graphs"][1]["choices"] = [c for c in told["graphs"][1]["choices"] if c["policy"] != "unpad"]
    told["graphs"].reverse()  # the order of graphs is no decision
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**told, "hash": ""}))
    changes = run(capsys, "diff", path, other, "--json").value["changes"]
    assert [(c["site"], c["what"], c["old"], c["new"]) for c in changes] == [
        ("layers.{0,2}", "attention-kernel", "sdpa-causal", "blocked"),
        ("graph 1", "pass unpad", "runs", "-"),
    ]
    other.write_text(json.dumps({**told, "hash": "", "graphs": told["graphs"][:1]}))
    changes = run(capsys, "diff", path, other, "--json").value["changes"]
    assert ("layers.{0,2}", "site", "gone") in {(c["site"], c["what"], c["reason"]) for c in changes}


def test_a_model_that_was_not_seen_whole_has_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "plan", "tests.cli.samples:asks_for_values", "-o", tmp_path / "plan.json")
    assert done.code == 2
    assert "EFF-P505" in done.err
    assert "--real" in done.err
    assert not (tmp_path / "plan.json").exists()
    assert run(capsys, "plan", "tests.cli.samples:asks_for_values", "--real", "-o", tmp_path / "plan.json").code == 0


def test_a_plan_of_an_older_schema_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema": 1, "hash": "", "target": "cpu", "choices": [], "fingerprints": []}))
    done = run(capsys, "show", path)
    assert done.code == 2
    assert "EFF-P503" in done.err
    assert "plan schema 1" in done.err
    assert "eff plan MODEL" in done.err


def test_a_broken_contract_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "tests.cli.samples:broken_graph", "-o", tmp_path / "plan.json", "--require", "attention=all")
    assert run(capsys, *words).code == 3
    assert not (tmp_path / "plan.json").exists()
