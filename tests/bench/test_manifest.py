"""Check that a manifest has its fields and names no place on the machine."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

from bench import manifest as module
from bench.case import Settings
from bench.manifest import ROOT, command, environment, manifest, scrub
from bench.store import check, empty, merge


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere/secret")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc.so.4")
    monkeypatch.setattr(sys, "argv", ["/opt/tools/bin/eff", "bench", "dit", "--out", f"{tempfile.gettempdir()}/x"])
    return manifest(Settings(threads=2, lengths=(512,)))


def test_it_has_what_a_result_needs(facts: dict[str, object]) -> None:
    document = empty("c", "t", "a", "call", "cpu", "chip")
    assert check(merge(document, facts, [])) == []
    versions, cpu = facts["versions"], facts["cpu"]
    assert isinstance(versions, dict)
    assert {"python", "torch", "transformers", "onnxruntime", "openvino"} <= set(versions)
    assert isinstance(cpu, dict)
    assert cpu["model"]
    assert cpu["isa"]
    assert facts["threads"] == 2
    assert facts["settings"] == {
        "device": "cpu",
        "rounds": 7,
        "warmup": 2,
        "lengths": [512],
        "limit": 900.0,
        "threads": 2,
    }
    assert facts["memory_bytes"]
    json.dumps(facts, allow_nan=False)


def test_it_names_no_place(facts: dict[str, object]) -> None:
    text = json.dumps(facts)
    for place in (str(ROOT), sys.prefix, str(Path.home()) + "/", "/somewhere", "/usr/lib", "/opt/tools"):
        assert place not in text
    assert facts["command"] == "eff bench dit --out tmp/x"
    assert facts["environment"]["OMP_NUM_THREADS"] == "3"  # type: ignore[index]
    assert facts["environment"]["LD_PRELOAD"] == "libtcmalloc.so.4"  # type: ignore[index]
    assert "TORCHINDUCTOR_CACHE_DIR" not in environment()


def test_the_commit_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert module.commit() == {"hash": None, "modified": None}


def test_errors_lose_their_folders() -> None:
    assert scrub(f"cannot open {ROOT}/bench/x and {tempfile.gettempdir()}/y") == "cannot open ./bench/x and tmp/y"
    assert command(["/a/b/eff", "bench", "--list"]) == "eff bench --list"
