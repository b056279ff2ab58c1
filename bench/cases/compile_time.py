"""Measure how long a user waits for the first answer: from nothing, and with the compilers' caches filled."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from bench.arms import known_names
from bench.case import Case, Row, Settings, Watch
from bench.cases.smollm2_prefill import SmolLM2Prefill
from bench.child import run_child
from bench.stats import Spread, ratios


@dataclass(frozen=True)
class CompileTime(Case):
    """Compile 30 layers at 1,024 tokens under no_grad in fresh processes, the arms alternating.

    Cold: a fresh process and an empty TorchInductor cache. Warm: a second process on the same cache. A trivial
    torch.compile comes first in each, so that the compilers' own start-up (precompiled headers, worker processes) is
    paid outside the measurement.
    """

    name: ClassVar[str] = "compile-time"
    title: ClassVar[str] = "Compile time, SmolLM2-135M (30 layers), 1,024 tokens"
    about: ClassVar[str] = (
        "First call minus a later call, Dynamo included, in a fresh process per arm after a trivial torch.compile; "
        "cold: an empty cache folder per arm and repetition; warm: a second process on the same folder."
    )
    unit: ClassVar[str] = "compilation"
    model: str = "smollm2-135m"
    length: int = 1024
    repetitions: int = 3

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the compilers; the baseline is TorchInductor, since eager compiles nothing."""
        return ("inductor", "inductor-max-autotune", "eff")

    def known_arms(self, device: str) -> tuple[str, ...]:
        """Return all that prepare anything."""
        return tuple(name for name in known_names(device) if name != "eager")

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return one row a length and dtype; measuring it gives a cold and a warm one."""
        length = 64 if settings.quick else self.length
        dtypes = settings.dtypes or ("float32",)
        lengths = settings.lengths or (length,)
        return [
            Row(f"{n}-{dtype}", {"length": n, "form": "no-cache", "dtype": dtype}) for n in lengths for dtype in dtypes
        ]

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Alternate the arms, repetition by repetition, a cold child and a warm one each."""
        names = self.chosen_arms(settings)
        answers: dict[str, dict[str, list[dict[str, Any]]]] = {
            kind: {name: [] for name in names} for kind in ("cold", "warm")
        }
        repetitions = 1 if settings.quick else self.repetitions
        for _ in range(repetitions):
            for name in names:
                with tempfile.TemporaryDirectory(prefix="eff-bench-") as folder:
                    for kind in ("cold", "warm"):
                        watch.say(f"{kind} {name}")
                        answers[kind][name].append(self._ask(row, name, settings, Path(folder)))
                        watch.tick(name)
        return [self._row(row, kind, found, repetitions) for kind, found in answers.items()]

    def _ask(self, row: Row, arm: str, settings: Settings, folder: Path) -> dict[str, Any]:
        request = {
            "task": "compile",
            "case": SmolLM2Prefill.name,
            "fields": asdict(SmolLM2Prefill(model=self.model, lengths=(int(row.parameters["length"]),))),
            "settings": settings.to_json() | {"quick": False, "forms": [], "lengths": [int(row.parameters["length"])]},
            "row": f"{row.parameters['length']}-no-cache-{row.parameters['dtype']}",
            "arm": arm,
        }
        cache = folder / "cache"
        return run_child(
            request, folder, {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
        )

    def _row(self, row: Row, kind: str, found: dict[str, list[dict[str, Any]]], repetitions: int) -> dict[str, Any]:
        arms: dict[str, Any] = {}
        spreads: dict[str, Spread] = {}
        for name, answers in found.items():
            failed = [answer["error"] for answer in answers if "error" in answer]
            if failed:
                arms[name] = {"error": failed[0]}
                continue
            spreads[name] = Spread(tuple(max(answer["compile_seconds"], 1e-6) for answer in answers))
            arms[name] = {"seconds": spreads[name].to_json(), **summary(answers)}
        base = [name for name in ("inductor",) if name in spreads]
        return {
            "id": f"{kind}-{row.id}",
            "parameters": {**row.parameters, "cache": kind},
            "rounds": repetitions,
            "arms": arms,
            "ratios": ratios(spreads, base, [name for name in ("eff",) if name in spreads]),
        }


def summary(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the children say beside the compile seconds: cache hits of each, the rest from the first."""
    first = answers[0]
    hits = ("autograd_cache_hit", "fxgraph_cache_hit")
    return {
        "cache_hits": [{name: int(answer["details"].get(name, 0)) for name in hits} for answer in answers],
        "first_call_seconds": [float(f"{answer['first_call_seconds']:.4g}") for answer in answers],
        "steady_seconds": [float(f"{answer['steady_seconds']:.4g}") for answer in answers],
        "trivial_seconds": [float(f"{answer['trivial_seconds']:.4g}") for answer in answers],
        "phases": first["phases"],
        "details": first["details"],
    }
