"""Measure in a fresh process what cannot be measured in a used one: peak memory, and compiling from nothing.

    python -m bench.child REQUEST.json ANSWER.json

`run_child` is the other end. A process of its own per arm, because neither the peak of a process nor the code it has
loaded goes back.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.manifest import ROOT, scrub

GRACE = 600.0
"""Seconds that a child may take beside the time box of its arm: imports, weights, the timed calls."""


def run_child(request: Mapping[str, Any], folder: Path, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run one request in a child process and return its answer; `{"error": text}` where it died or took too long."""
    question, answer = folder / "request.json", folder / "answer.json"
    question.write_text(json.dumps(dict(request)), encoding="utf-8")
    answer.unlink(missing_ok=True)
    words = [sys.executable, "-m", "bench.child", str(question), str(answer)]
    limit = float(request["settings"].get("limit") or 0)
    try:
        done = subprocess.run(
            words,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=limit + GRACE if limit else None,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"OutOfTime: the process was stopped after {limit + GRACE:.0f} s"}
    if answer.is_file():
        return dict(json.loads(answer.read_text(encoding="utf-8")))
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
    return {"error": scrub(f"the process ended with {done.returncode}: {last[0][:400]}")}


def answer_to(request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what a request asks for."""
    tasks: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "memory": _memory,
        "compile": _compile,
        "export": _export,
        "moe": _moe,
    }
    return tasks[request["task"]](request)


def _setup(request: Mapping[str, Any]) -> tuple[Any, Callable[[], Any]]:
    """Return the settings, and a function that builds the workload of the request's row."""
    import torch

    from bench.case import Settings, find_case
    from bench.model_case import ModelCase

    settings = Settings.from_json(request["settings"])
    torch.set_num_threads(settings.threads)
    found = find_case(request["case"])
    case = type(found)(**request.get("fields", {}))
    assert isinstance(case, ModelCase)
    row = next(row for row in case.rows(settings) if row.id == request["row"])
    return settings, lambda: case.workload(row, settings)


def _export(request: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from bench.arms import export_onnx

    _, build = _setup(request)
    with torch.no_grad():
        model = export_onnx(build(), Path(request["scratch"]))
    model.save_feeds()
    return {"seconds": model.seconds}


def _memory(request: Mapping[str, Any]) -> dict[str, Any]:
    """Make the first calls, then read how far memory rises in the next three."""
    import torch

    from bench.arms import OnnxModel, Scratch, known_arms
    from bench.arms_onnx import OnnxRuntime, OpenVino
    from bench.limits import time_box
    from bench.model_case import DTYPES

    settings, build = _setup(request)
    arm = known_arms()[request["arm"]]
    imported = _status("VmRSS")
    with torch.no_grad(), time_box(settings.limit):
        if arm.exports:
            model = OnnxModel.load(Path(request["scratch"]) / "model.onnx")
            if isinstance(arm, OpenVino):
                ready = arm.load(model, settings.threads, DTYPES[request["dtype"]])
            else:
                assert isinstance(arm, OnnxRuntime)
                ready = arm.load(model, settings.threads)
        else:
            ready = arm.prepare(build(), Scratch(Path(request["scratch"])), settings.threads)
        for _ in range(2):
            ready.bound.rewind()
            ready.bound.call()
        before, reset = start_peak(settings.device)
        for _ in range(3):
            ready.bound.rewind()
            ready.bound.call()
        peak = peak_of(settings.device)
    rise = max(0, peak - before) if reset else None
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "bytes": {
            "imported": imported,
            "call_peak": peak,
            "before": before,
            "rise": rise,
            "process_peak": process,
            "peak_was_reset": reset,
        }
    }


def _moe(request: Mapping[str, Any]) -> dict[str, Any]:
    """Make the first calls of a block of the case moe, then read how far memory rises in the next three."""
    import torch

    from bench.case import Settings
    from bench.cases import moe
    from bench.limits import time_box

    settings, at = Settings.from_json(request["settings"]), request["parameters"]
    torch.set_num_threads(settings.threads)
    with torch.no_grad(), time_box(settings.limit):
        block, inputs = moe.build(str(at["form"]), int(at["length"]), str(at["dtype"]), settings.device)
        call = moe.call(block, inputs[:1], *request["arm"])
        call()
        before, reset = start_peak(settings.device)
        for _ in range(3):
            call()
        peak = peak_of(settings.device)
    if not reset:
        return {"error": "the peak of a process cannot be reset here"}
    return {"bytes": {"call_peak": max(1, peak - before), "before": before, "process_peak": peak}}


def start_peak(device: str) -> tuple[int, bool]:
    """Return the memory in use now, and whether the peak counts from here on."""
    import gc

    import torch

    gc.collect()
    if device != "cuda":
        # What malloc keeps after compiling would hide what a call needs.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated()), True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _status("VmRSS"), False
    return _status("VmRSS"), True


def peak_of(device: str) -> int:
    import torch

    # ru_maxrss cannot be reset, and an exec'ed child inherits its parent's: VmHWM is this process's own.
    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _compile(request: Mapping[str, Any]) -> dict[str, Any]:
    """Pay what any first compilation pays, then time the first call of the arm and two more."""
    import tempfile

    import torch

    from bench.arms import Scratch, as_json, known_arms
    from bench.limits import time_box

    settings, build = _setup(request)
    arm = known_arms()[request["arm"]]
    begun = time.perf_counter()
    torch.compile(lambda x: x + 1)(torch.ones(8))
    trivial = time.perf_counter() - begun
    workload = build()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, time_box(settings.limit):
        eager = workload.bind(workload.module, workload.dtype)
        eager.rewind()
        eager.call()  # reads every weight once, so that no page fault counts as compiling
        phases = _phases()
        begun = time.perf_counter()
        ready = arm.prepare(workload, Scratch(Path(folder)), settings.threads)
        ready.bound.rewind()
        ready.bound.call()
        first = time.perf_counter() - begun
        steady = []
        for _ in range(2):
            ready.bound.rewind()
            begun = time.perf_counter()
            ready.bound.call()
            steady.append(time.perf_counter() - begun)
        details = dict(ready.details())
    spent = {name: value - phases.get(name, 0.0) for name, value in _phases().items()}
    return {
        "compile_seconds": max(0.0, first - min(steady)),
        "first_call_seconds": first,
        "steady_seconds": min(steady),
        "trivial_seconds": trivial,
        "phases": {name: float(f"{value:.4g}") for name, value in spent.items() if value >= 0.05},
        "details": as_json(details),
    }


def _phases() -> dict[str, float]:
    """Return the seconds that torch itself counted for each phase of compiling; phases nest."""
    from torch._dynamo import utils

    return {name: float(sum(values)) for name, values in utils.compilation_time_metrics.items()}


def main(question: str, answer: str) -> None:
    """Answer one request file."""
    from bench.limits import OutOfTime

    request = json.loads(Path(question).read_text(encoding="utf-8"))
    try:
        found = answer_to(request)
    except OutOfTime as late:
        found = {"error": f"OutOfTime: {late}"}
    except Exception as error:
        found = {"error": scrub(f"{type(error).__name__}: {' '.join(str(error).split())[:600]}")}
    scratch = Path(answer + ".part")
    scratch.write_text(json.dumps(found), encoding="utf-8")
    os.replace(scratch, answer)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
