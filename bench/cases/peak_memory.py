"""Measure how much memory a long prefill needs, one process an arm."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from bench.arms import default_arms, known_arms, known_names
from bench.case import Case, Row, Settings, Watch
from bench.cases.smollm2_prefill import SmolLM2Prefill
from bench.child import run_child
from bench.stats import Spread, ratios


@dataclass(frozen=True)
class PeakMemory(Case):
    """Call a model in a fresh process per arm and read how far its memory rose."""

    name: ClassVar[str] = "peak-memory"
    title: ClassVar[str] = "Peak memory, SmolLM2-135M prefill with use_cache=False"
    about: ClassVar[str] = (
        "Highest resident memory of a fresh process per arm during three calls after two (VmHWM, reset before them; "
        "on a GPU torch's peak allocation). The ONNX arms load a file that another process exported. Compiling is not "
        "included."
    )
    unit: ClassVar[str] = "bytes"
    model: str = "smollm2-135m"
    lengths: tuple[int, ...] = (4096, 8192)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the peers of a device."""
        return default_arms(device)

    def known_arms(self, device: str) -> tuple[str, ...]:
        """Return every arm that the device can run."""
        return known_names(device)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return one row a length and dtype."""
        lengths = settings.lengths or ((128,) if settings.quick else self.lengths)
        return [
            Row(f"{n}-no-cache-{dtype}", {"length": n, "form": "no-cache", "dtype": dtype})
            for n in lengths
            for dtype in settings.dtypes or ("float32",)
        ]

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure each arm in its own process."""
        names = self.chosen_arms(settings)
        arms: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(prefix="eff-bench-") as folder:
            exported: dict[str, Any] | None = None
            for name in names:
                watch.say(f"memory of {name}")
                if known_arms()[name].exports:
                    if name == "onnxruntime" and row.parameters["dtype"] != "float32":
                        arms[name] = {"skipped": "ONNX Runtime is compared in float32"}
                        continue
                    exported = exported or run_child(self._request("export", row, name, settings, folder), Path(folder))
                    if "error" in exported:
                        arms[name] = {"error": f"export: {exported['error']}"}
                        continue
                arms[name] = run_child(self._request("memory", row, name, settings, folder), Path(folder))
                watch.tick(name)
        peaks = {name: Spread((float(arm["bytes"]["call_peak"]),)) for name, arm in arms.items() if "bytes" in arm}
        ours = [name for name in ("eff",) if name in peaks]
        return [
            {
                "id": row.id,
                "parameters": dict(row.parameters),
                "rounds": 1,
                "arms": arms,
                "ratios": ratios(peaks, [name for name in names[:1] if name in peaks], ours),
            }
        ]

    def _request(self, task: str, row: Row, arm: str, settings: Settings, folder: str) -> dict[str, Any]:
        length = int(row.parameters["length"])
        return {
            "task": task,
            "case": SmolLM2Prefill.name,
            "fields": asdict(SmolLM2Prefill(model=self.model, lengths=(length,))),
            "settings": settings.to_json() | {"quick": False, "forms": [], "lengths": [length]},
            "row": row.id,
            "arm": arm,
            "dtype": row.parameters["dtype"],
            "scratch": folder,
        }
