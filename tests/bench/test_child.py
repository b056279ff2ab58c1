"""Check measurements in processes of their own, with a tiny model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bench import store
from bench.case import Settings, Watch
from bench.cases.compile_time import CompileTime
from bench.cases.peak_memory import PeakMemory
from bench.child import run_child

SETTINGS = Settings(quick=True, threads=1, limit=120.0)


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    request = {"task": "memory", "case": "dit", "settings": SETTINGS.to_json(), "row": "64-float32", "arm": "nobody"}
    assert run_child(request, tmp_path) == {"error": "KeyError: 'nobody'"}


@pytest.mark.slow
def test_memory_of_an_arm_is_read_in_its_own_process(tmp_path: Path) -> None:
    request = {
        "task": "memory",
        "case": "dit",
        "fields": {},
        "settings": dataclasses.replace(SETTINGS, dtypes=("float32",)).to_json(),
        "row": "64-float32",
        "arm": "eager",
        "scratch": str(tmp_path),
        "dtype": "float32",
    }
    answer = run_child(request, tmp_path)
    found = answer["bytes"]
    assert 2**26 < found["before"] <= found["call_peak"] <= found["process_peak"] * 1.1
    assert found["rise"] is None or found["rise"] == found["call_peak"] - found["before"]


@pytest.mark.slow
def test_a_compilation_is_timed_from_an_empty_cache(tmp_path: Path) -> None:
    request = {
        "task": "compile",
        "case": "dit",
        "settings": dataclasses.replace(SETTINGS, dtypes=("float32",)).to_json(),
        "row": "64-float32",
        "arm": "aot-eager",
    }
    answer = run_child(request, tmp_path, {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert answer["first_call_seconds"] > answer["compile_seconds"] > answer["steady_seconds"]
    assert answer["details"]["graphs"] == 1
    assert answer["phases"]["_compile.compile_inner"] > 0


def test_cases_turn_answers_into_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = {
        "compile_seconds": 2.0,
        "first_call_seconds": 2.5,
        "steady_seconds": 0.5,
        "trivial_seconds": 1.0,
        "phases": {},
        "details": {"fxgraph_cache_hit": 1},
    }

    def answer(request: dict[str, object], folder: Path, environment: object = None) -> dict[str, object]:
        if request["arm"] == "inductor-max-autotune":
            return {"error": "too slow"}
        return compiled if request["task"] == "compile" else {"bytes": {"call_peak": 10, "before": 5, "rise": 5}}

    facts = {"date": "d", "versions": {}, "cpu": {}, "threads": 1, "memory_bytes": 1, "commit": {}, "command": ""}
    facts |= {"environment": {}, "settings": {}, "load": []}
    for module, case in (("compile_time", CompileTime()), ("peak_memory", PeakMemory())):
        monkeypatch.setattr(f"bench.cases.{module}.run_child", answer)
        rows = case.measure(case.rows(SETTINGS)[0], SETTINGS, Watch())
        document = store.merge(store.empty(case.name, case.title, case.about, case.unit, "cpu", "chip"), facts, rows)
        assert store.check(document) == []
        assert rows[0]["arms"]["inductor-max-autotune"] == {"error": "too slow"}
        assert ("eff", "inductor") in {(item["arm"], item["to"]) for item in rows[0]["ratios"]}
    assert [row["id"] for row in CompileTime().measure(CompileTime().rows(SETTINGS)[0], SETTINGS, Watch())] == [
        "cold-64-float32",
        "warm-64-float32",
    ]
