"""Time what is built for GPUs that are not here: engines of TensorRT-RTX, binaries of Triton kernels."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import effcompile as eff
from bench.case import Case, Row, Settings, Watch
from bench.stats import Spread, ratios
from effcompile.cli.models import load_model
from effcompile.cli.parameters import parse_dtype

TRITON = "triton"
MODELS = ("smollm2-135m", "minilm-l6", "dinov2-s", "dit-4k")
SMALL = ("llama-tiny",)
CHIPS = "sm_80,sm_86,sm_89,sm_120,sm_121"
COMPUTES = "sm_80,sm_89,sm_90,sm_100,sm_120,gfx942,gfx950"
FIRST, AGAIN = "first", "again"


@dataclass(frozen=True)
class Builds(Case):
    """Build everything twice: how long does it take, and does the same come out?"""

    name: ClassVar[str] = "builds"
    title: ClassVar[str] = "Builds for GPUs that are not here"
    headline: ClassVar[bool] = False
    unit: ClassVar[str] = "compilation"
    about: ClassVar[str] = (
        f"Models: ONNX, its comparison with eager, and one engine of TensorRT-RTX for {CHIPS}; twice, compared byte for byte. "
        f"triton: every kernel of the catalog for {COMPUTES}, from an empty cache, then again. Seconds are those of this machine's "
        "cores; no GPU takes part."
    )
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    form_words: ClassVar[tuple[str, ...]] = (*MODELS, *SMALL, TRITON)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return both builds."""
        return (FIRST, AGAIN)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return a row for each model and one for the kernels; with --quick a small model and one kernel."""
        known = (*SMALL, TRITON) if settings.quick else (*MODELS, TRITON)
        asked = [form for form in self.form_words if form in (settings.forms or known)]
        dtype = (settings.dtypes or ("float32",))[0]
        return [Row(form, {"form": form, "dtype": "float32" if form == TRITON else dtype}) for form in asked]

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Build twice, in folders that are removed."""
        form, dtype = str(row.parameters["form"]), str(row.parameters["dtype"])
        with tempfile.TemporaryDirectory(prefix="eff-bench-") as folder:
            if form == TRITON:
                arms = _kernels(Path(folder), settings.quick, watch)
            else:
                arms = _engines(form, dtype, Path(folder), settings.quick, watch)
        spreads = {name: Spread((float(arm["seconds"]["median"]),)) for name, arm in arms.items()}
        return [
            {
                "id": row.id,
                "parameters": dict(row.parameters),
                "rounds": 1,
                "arms": arms,
                "ratios": ratios(spreads, (FIRST,), ()),
            }
        ]


def _engines(form: str, dtype: str, folder: Path, quick: bool, watch: Watch) -> dict[str, dict[str, Any]]:
    given = load_model(f"zoo:{form}", {"batch": 2, "seq": 16}, parse_dtype(dtype), real=True)
    steps: list[str] = []

    def build(place: str) -> Any:
        return eff.export(
            given.model,
            given.args,
            given.kwargs,
            to="tensorrt-rtx",
            target="sm_86,sm_89" if quick else CHIPS,
            out=folder / place,
            name=form,
            say=steps.append,
        )

    arms, files = {}, []
    for name in (FIRST, AGAIN):
        steps.clear()
        made, arms[name] = _timed(partial(build, name), name, watch)
        files.append({file: entry for file, entry in made.files if file.endswith((".engine", ".onnx"))})
        arms[name] |= {
            "engine_seconds": sum(float(text.split()[-2]) for text in steps if text.startswith("built ")),
            "engine_bytes": sum(entry.bytes for file, entry in made.files if file.endswith(".engine")),
            "attention": dict(made.details)["attention"],
            "onnx_error": max(check.error for check in made.checks),
        }
    arms[AGAIN]["same_bytes"] = files[0] == files[1]
    return arms


def _kernels(folder: Path, quick: bool, watch: Watch) -> dict[str, dict[str, Any]]:
    arms = {}
    catalog, chips = ("kernels:decode_merge", "sm_90,gfx942") if quick else ("kernels:all", COMPUTES)
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(folder / "cache")):
        for name in (FIRST, AGAIN):
            build = partial(eff.export, catalog, to="triton", target=chips, out=folder / name)
            made, arms[name] = _timed(build, name, watch)
            arms[name]["binaries"] = int(dict(made.details)["binaries"])
    return arms


def _timed(build: Callable[[], Any], name: str, watch: Watch) -> tuple[Any, dict[str, Any]]:
    """Return what a build made, and its seconds; `cpu_seconds` are those of all cores, which other work does not change."""
    watch.say(f"building, {name}")
    begun, used = time.perf_counter(), _cpu_seconds()
    made = build()
    taken: Mapping[str, Any] = Spread((time.perf_counter() - begun,)).to_json()
    watch.tick(name)
    return made, {"seconds": dict(taken), "cpu_seconds": float(f"{_cpu_seconds() - used:.4g}")}


def _cpu_seconds() -> float:
    """Return what this process and its children, as far as they have ended, took of all cores."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
