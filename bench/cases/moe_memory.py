"""Measure how much memory the prefill of a mixture-of-experts block needs, one process an arm."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bench.case import Case, Row, Settings, Watch, grid
from bench.cases.moe import ARMS, BLOCKS, EINSUM
from bench.child import run_child
from bench.stats import Spread, ratios

BASELINE = "grouped-inductor"


@dataclass(frozen=True)
class MoEMemory(Case):
    """Call a block in a fresh process per arm and read how far its memory rises above the weights."""

    name: ClassVar[str] = "moe-memory"
    title: ClassVar[str] = "Peak memory of mixture-of-experts blocks"
    headline: ClassVar[bool] = False
    about: ClassVar[str] = (
        "The blocks of the case moe in a fresh process per arm: highest resident memory during three calls after two, less what "
        "was resident before them, weights included. `call_peak` is that rise. Compiling is not included."
    )
    unit: ClassVar[str] = "bytes"
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    form_words: ClassVar[tuple[str, ...]] = tuple(BLOCKS)
    lengths: tuple[int, ...] = (2048,)
    forms: tuple[str, ...] = ("mixtral", "qwen3-moe", "gpt-oss")
    dtypes: tuple[str, ...] = ("float32",)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return transformers' grouped products and ours."""
        return (BASELINE, "eff", "eff-prepared")

    def known_arms(self, device: str) -> tuple[str, ...]:
        """Return all arms of the case moe."""
        return tuple(ARMS)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return tokens x block x dtype."""
        forms = settings.forms or (("qwen3-moe",) if settings.quick else self.forms)
        forms = tuple(form for form in forms if form != EINSUM)
        return grid(settings, (64,) if settings.quick else self.lengths, forms, self.dtypes)

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure each arm in its own process."""
        arms: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(prefix="eff-bench-") as folder:
            for name in self.chosen_arms(settings):
                watch.say(f"memory of {name}")
                request = {
                    "task": "moe",
                    "settings": settings.to_json(),
                    "parameters": dict(row.parameters),
                    "arm": list(ARMS[name]),
                }
                arms[name] = run_child(request, Path(folder))
                watch.tick(name)
        peaks = {name: Spread((float(arm["bytes"]["call_peak"]),)) for name, arm in arms.items() if "bytes" in arm}
        first, ours = list(peaks)[:1], [name for name in ("eff",) if name in peaks]
        return [
            {
                "id": row.id,
                "parameters": dict(row.parameters),
                "rounds": 1,
                "arms": arms,
                "ratios": ratios(peaks, first, ours),
            }
        ]
