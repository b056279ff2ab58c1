"""Check `eff explain`: tables, JSON, the page, contracts and numerics."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.command import run

SITE_FIELDS = {
    *(
        "id",
        "source",
        "heads",
        "kv_heads",
        "q_len",
        "mask",
        "dtype",
        "kernel",
        "reason",
        "seconds",
        "tag",
        "floor_seconds",
    ),
    *("bound", "declined", "crossovers", "graph", "places", "instances"),
}
TOP_FIELDS = {
    *("schema", "model", "target", "device", "machine", "inputs", "weights", "graphs", "sites", "missed", "breaks"),
    *("unseen", "stop", "seconds", "modelled", "command", "policy", "caches", "experts", "experts_kept"),
}


def test_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "explain", "zoo:llama-tiny", "--target", "sm_90", "--shape", "b=2,s=64", "--json").value
    assert set(told) == TOP_FIELDS
    assert (told["schema"], told["target"], told["weights"]) == (1, "sm_90", "not read")
    assert told["inputs"] == ["int64[2, 64]"]
    assert [site["id"] for site in told["sites"]] == ["layers.0.attn", "layers.1.attn"]
    first = told["sites"][0]
    assert set(first) >= SITE_FIELDS
    assert (first["mask"], first["heads"], first["kv_heads"], first["q_len"]) == ("causal", 4, 2, 64)
    assert first["seconds"] >= first["floor_seconds"] > 0
    assert {item["code"] for item in first["declined"]} == set(re.findall(r"EFF-A\d+", str(first["declined"])))
    assert told["command"] == "eff explain zoo:llama-tiny --target sm_90 --shape b=2,s=64 --json"
    assert told["graphs"][0]["plan"]["target"] == "sm_90"


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "explain", "zoo:llama-tiny", "--target", "h100")
    assert done.code == 0
    for part in ("2 attention sites: 2 rewritten, 0 not", "layers.{0-1}.attn", "sdpa-causal", "llama.py:", "modelled"):
        assert part in done.out
    assert done.err == ""


def test_a_policy_is_an_option_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--attention", "sink-window{window=16,dense_layers=1}", "--shape", "b=1,s=64", "--target", "cpu")
    done = run(capsys, "explain", "zoo:llama-tiny", *asked, "--require", "attention=all")
    assert done.code == 0
    for part in ("2 attention sites: 1 rewritten, 0 not, 1 dense as asked", "sink-window{window=16}", "EFF-A501"):
        assert part in done.out
    plan = tmp_path / "plan.json"
    assert run(capsys, "plan", "zoo:llama-tiny", *asked, "-o", plan).code == 0
    assert "sink-window{window=16}" in run(capsys, "show", plan).out
    assert run(capsys, "explain", "zoo:llama-tiny", "--attention", "sink-windw").code == 2


def test_the_cache_is_an_option_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--kv` and `--evict` prepare the model; a dry run lists what its cache would be, and a wrong word is told."""
    asked = ("--kv", "kivi{residual=32}", "--evict", "snapkv{budget=40}", "--shape", "b=1,s=64", "--target", "cpu")
    told = run(capsys, "explain", "tests.cli.samples:small_llama", *asked, "--json").value
    assert [row["format"] for row in told["caches"]] == ["kivi{residual=32} evict=snapkv{budget=40}"]
    for evict in ("keyformer{least=16}", "expected-attention{least=16}"):
        told = run(
            capsys, "explain", "tests.cli.samples:small_llama", "--evict", evict, "--target", "cpu", "--json"
        ).value
        assert [row["format"] for row in told["caches"]] == [f"plain evict={evict}"]
        assert not told["missed"]
    plan = tmp_path / "plan.json"
    assert run(capsys, "plan", "tests.cli.samples:small_llama", *asked, "-o", plan).code == 0
    for words, code in (
        (("tests.cli.samples:small_llama", "--kv", "kivy"), "EFF-U014"),
        (("tests.cli.samples:small_llama", "--evict", "snapkv{budget=2}"), "EFF-U004"),
        (("zoo:llama-tiny", "--evict", "snapkv"), "EFF-K205"),
    ):
        done = run(capsys, "explain", *words)
        assert done.code == 2
        assert code in done.err


def test_page_is_self_contained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    words = ("explain", "tests.cli.samples:broken_graph", "--target", "cpu", "--html", page, "--numerics")
    assert run(capsys, *words).code == 0
    html = page.read_text()
    assert html.startswith("<!doctype html>")
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b|@import|url\(|\bsrc=|\bhref=", html)
    for part in (
        "<svg",
        "layers.{0,2}",
        "EFF-G301",
        "Numerics of",
        "Graph breaks",
        "eff explain tests.cli",
        "&quot;hash&quot;",
    ):
        assert part in html
    assert html.count("<table") == html.count("</table>")


def test_numerics_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "explain", "zoo:llama-tiny", "--target", "cpu", "--numerics", "--json")
    assert done.code == 0
    (ledger,) = done.value["numerics"]
    stages = [row["stage"] for row in ledger["rows"]]
    assert stages.index("recognized") < stages.index("kernels")
    assert all(row["rmse"] > 0 for row in ledger["rows"])
    assert ledger["within"]


def test_numerics_of_a_wrong_pass_are_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "explain",
        "tests.cli.samples:plain",
        "--pass",
        "tests.cli.samples:WrongActivation",
        "--numerics",
        "--json",
    )
    done = run(capsys, *words)
    assert done.code == 1
    assert done.value["numerics"][0]["culprit"] == "wrong-activation"


def test_contract_counts_modules_and_not_only_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(capsys, "explain", "tests.cli.samples:plain", "--require", "attention=all")
    assert whole.code == 0
    done = run(capsys, "explain", "tests.cli.samples:broken_graph", "--require", "attention=all")
    assert done.code == 3
    assert "EFF-P502" in done.err
    assert "2 of 3 sites rewritten" in done.err
    assert "layers.1 " in done.err
    assert run(capsys, "explain", "tests.cli.samples:broken_graph", "--require", "attention=2").code == 0
    told = run(capsys, "explain", "tests.cli.samples:broken_graph", "--require", "attention=all", "--json")
    assert (told.code, told.value["unseen"][0]["module"]) == (3, "layers.1")


def test_values_that_are_not_there_stop_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "explain", "tests.cli.samples:asks_for_values")
    assert done.code == 1
    assert re.search(r"stopped early.*samples\.py:\d+ in layers\.1.*--real", done.out)
    assert run(capsys, "explain", "tests.cli.samples:asks_for_values", "--real").code == 0


def test_symbolic_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "explain", "zoo:llama-tiny", "--target", "cpu", "--dynamic", "--json").value
    assert isinstance(told["sites"][0]["q_len"], str)
