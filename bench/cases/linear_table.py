"""Measure torch's linear against eff::linear (oneDNN) over the layer sizes of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from bench import table_case
from bench.case import Case, Row, Settings, Watch
from bench.table_case import Kernel, seeded

LAYERS = (
    ("minilm-qkv", 384, 384),
    ("minilm-up", 384, 1536),
    ("minilm-down", 1536, 384),
    ("smollm2-qkv", 576, 576),
    ("smollm2-up", 576, 1536),
    ("smollm2-down", 1536, 576),
    ("smollm2-head", 576, 49152),
    ("bert-base-up", 768, 3072),
    ("dit-xl-up", 1152, 4608),
    ("llama-1b-up", 2048, 8192),
)
"""Name, input width and output width of a layer."""


@dataclass(frozen=True)
class LinearTable(Case):
    """Time x @ W^T + b for row counts from one token to a long prefill."""

    name: ClassVar[str] = "linear-table"
    title: ClassVar[str] = "Linear layers"
    headline: ClassVar[bool] = False
    adds_arms: ClassVar[bool] = True
    about: ClassVar[str] = (
        "GFLOP/s of aten.linear (the BLAS that torch links) and of eff::linear (oneDNN, weight packed inside the call)."
    )
    form_words: ClassVar[tuple[str, ...]] = tuple(name for name, _, _ in LAYERS)
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    layers: tuple[tuple[str, int, int], ...] = LAYERS
    lengths: tuple[int, ...] = (1, 16, 64, 256, 1024, 4096)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the two implementations; torch's is the baseline."""
        return ("aten", "eff-linear")

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return layer x rows x dtype; `--forms` names layers."""
        lengths = settings.lengths or ((64,) if settings.quick else self.lengths)
        return [
            Row(f"{name}-{rows}-{dtype}", {"layer": name, "in": width, "out": out, "length": rows, "dtype": dtype})
            for name, width, out in (self.layers[:3] if settings.quick else self.layers)
            if not settings.forms or name in settings.forms
            for rows in lengths
            for dtype in self.dtypes
            if not settings.dtypes or dtype in settings.dtypes
        ]

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure both on one row."""
        from effcompile import ops

        ops.register()
        at = row.parameters
        rows, width, out, dtype = int(at["length"]), int(at["in"]), int(at["out"]), str(at["dtype"])
        x = seeded((rows, width), dtype, settings.device, 1)
        weight, bias = seeded((out, width), dtype, settings.device, 2), seeded((out,), dtype, settings.device, 3)
        flops = 2.0 * rows * width * out
        kernels: dict[str, Kernel | str] = {
            "aten": Kernel(lambda: lambda: F.linear(x, weight, bias), flops),
            "eff-linear": Kernel(lambda: lambda: torch.ops.eff.linear_v1(x, weight, bias), flops),
        }
        chosen = self.chosen_arms(settings)
        return [
            table_case.measure(
                row, {n: k for n, k in kernels.items() if n in chosen}, settings, watch, useful_flops=flops
            )
        ]
