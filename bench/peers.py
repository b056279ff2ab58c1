"""Measure one workload in several arms: prepare and check each, then let them take turns."""

from __future__ import annotations

import gc
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.arms import Arm, Ready, Scratch, TorchArm, as_json, counters, known_arms
from bench.case import Row, Settings, Watch
from bench.clocks import timer_for
from bench.limits import OutOfTime, time_box
from bench.manifest import scrub
from bench.numerics import Reference
from bench.rounds import interleave
from bench.stats import Spread, ratios
from bench.workload import Workload

OURS = ("eff", "eff-max-autotune")


@dataclass
class _Entry:
    """Collect what is known of one arm while the row is measured."""

    arm: Arm
    ready: Ready | None = None
    first: float = 0.0
    result: dict[str, Any] | None = None


def measure(row: Row, workload: Workload, names: Sequence[str], settings: Settings, watch: Watch) -> dict[str, Any]:
    """Measure a workload in the named arms and return the row as JSON values.

    Seconds are per unit of the workload (`steps` of them in a call). An arm that cannot run has `skipped`, one that
    failed `error`.
    """
    torch.set_num_threads(settings.threads)
    release()
    entries = [_Entry(known_arms()[name]) for name in names]
    load = [os.getloadavg()[0]]
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="eff-bench-") as folder:
        watch.say("reference")
        reference = reference_of(workload)
        scratch = Scratch(Path(folder))
        if any(isinstance(entry.arm, TorchArm) and entry.arm.backend in ("inductor", "eff") for entry in entries):
            # Headers and worker processes are paid once. What the first arm leaves in the caches still helps the next: a
            # row's compile times are a hint, the case compile-time measures them.
            torch.compile(lambda x: x + 1)(torch.ones(8))
        for entry in entries:
            watch.say(f"preparing {entry.arm.name}")
            entry.result = _prepare(entry, workload, scratch, reference, settings)
        graphs = counters()["graphs"]
        spreads = _rounds(entries, settings, watch)
        for entry in entries:
            _finish(entry, spreads.get(entry.arm.name), workload.steps)
            if entry.ready is not None:
                entry.ready.close()
        recompiled = counters()["graphs"] - graphs
    release()
    load.append(os.getloadavg()[0])
    scaled = {name: spread.scaled(1 / workload.steps) for name, spread in spreads.items()}
    ours = [name for name in OURS if name in scaled]
    return {
        "id": row.id,
        "parameters": dict(row.parameters),
        "rounds": settings.rounds,
        "warmup": settings.warmup,
        "steps": workload.steps,
        "load": [round(value, 2) for value in load],
        "recompiled": recompiled,
        "notes": list(workload.notes),
        "arms": {entry.arm.name: entry.result for entry in entries},
        "ratios": ratios(scaled, names[:1], ours),
    }


def reference_of(workload: Workload) -> Reference:
    """Run the module eagerly in its own dtype and in float64 with the same weights, and keep what is compared."""
    eager = _run_eager(workload, workload.dtype)
    try:
        return Reference(_run_eager(workload, torch.float64), eager, "float64", workload.dtype)
    except (RuntimeError, NotImplementedError):  # no memory for it, or no float64 kernel
        kind = "float32" if workload.dtype != torch.float32 else str(workload.dtype).removeprefix("torch.")
        return Reference(_run_eager(workload, torch.float32), eager, kind, workload.dtype)


def _run_eager(workload: Workload, dtype: torch.dtype) -> Tensor:
    from bench.workload import primary

    bound = workload.bind(workload.twin(dtype), dtype)
    bound.rewind()
    return workload.select(primary(bound.call())).cpu().clone()


def _prepare(
    entry: _Entry, workload: Workload, scratch: Scratch, reference: Reference, settings: Settings
) -> dict[str, Any]:
    """Prepare an arm, make its first call and compare its output; return what is known, or why there is nothing."""
    if reason := entry.arm.refuses(workload):
        return {"skipped": reason}
    begun = time.perf_counter()
    try:
        with time_box(settings.limit), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ready = entry.arm.prepare(workload, scratch, settings.threads)
            ready.bound.rewind()
            outcome = ready.bound.call()
            entry.first = time.perf_counter() - begun
            output = workload.select(ready.tensor(outcome)).cpu().clone()
    except OutOfTime as late:
        return {"error": f"OutOfTime: preparing it was {late}"}
    except Exception as error:
        return {"error": scrub(_one_line(error))}
    del outcome
    entry.ready = ready
    said = {str(item.message).splitlines()[0] for item in caught if "effcompile" in str(item.message)}
    details = dict(ready.details())
    found: dict[str, Any] = as_json(
        {"numerics": reference.compare(output), "warnings": sorted(said), "details": details}
    )
    return found


def _rounds(entries: Sequence[_Entry], settings: Settings, watch: Watch) -> dict[str, Spread]:
    ready = {entry.arm.name: entry.ready for entry in entries if entry.ready is not None}
    if not ready:
        return {}
    watch.say("rounds")
    collecting = gc.isenabled()
    gc.disable()  # a collection that falls into one arm's turn is not its cost
    try:
        return interleave(
            {name: item.bound.call for name, item in ready.items()},
            timer_for(settings.device),
            settings.rounds,
            warmup=settings.warmup,
            before=lambda name: ready[name].bound.rewind(),
            tick=watch.tick,
        )
    finally:
        if collecting:
            gc.enable()


def _finish(entry: _Entry, spread: Spread | None, steps: int) -> None:
    if spread is None or entry.ready is None or entry.result is None:
        return
    timing: dict[str, Any] = {"seconds": spread.scaled(1 / steps).to_json()}
    if entry.arm.compiles:
        timing["compile_seconds"] = float(f"{max(0.0, entry.first + entry.ready.earlier - spread.median):.4g}")
    entry.result = {**timing, **entry.result}


def release() -> None:
    """Forget compiled code and free its memory, so that no row inherits anything from the one before."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    if text:
        return f"{name}: {text[:600]}"
    return f"{name} in {traceback.extract_tb(error.__traceback__)[-1].name}"
