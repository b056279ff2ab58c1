"""Measure linear layers of a few rows, as a step of decoding has them, with weights that come from memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import table_case
from bench.case import Case, Row, Settings, Watch
from bench.table_case import Kernel, seeded

LAYERS = (
    ("smollm2-kv", 576, 192),
    ("smollm2-qkv", 576, 576),
    ("smollm2-up", 576, 1536),
    ("smollm2-down", 1536, 576),
    ("smollm2-head", 576, 49152),
    ("llama-1b-up", 2048, 8192),
    ("llama-1b-down", 8192, 2048),
)
"""Name, input width and output width of a layer."""
COLD = 1 << 28  # bytes of weights that are read in turn, so that none is in a cache


@dataclass(frozen=True)
class StepTable(Case):
    """Time x @ W^T for one to eight rows over many weights of one shape."""

    name: ClassVar[str] = "step-table"
    title: ClassVar[str] = "Linear layers of a few rows"
    headline: ClassVar[bool] = False
    adds_arms: ClassVar[bool] = True
    about: ClassVar[str] = (
        "GFLOP/s of aten.linear (the BLAS that torch links), of eff::linear_rows (every core reads weights) and of oneDNN, over as "
        "many weights of one shape as are 256 MB, one after the other, as in a step of decoding; seconds are of one layer."
    )
    form_words: ClassVar[tuple[str, ...]] = tuple(name for name, _, _ in LAYERS)
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    layers: tuple[tuple[str, int, int], ...] = LAYERS
    lengths: tuple[int, ...] = (1, 2, 4, 8)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the implementations; torch's is the baseline."""
        return ("aten", "eff-rows", "onednn")

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return layer x rows x dtype; `--forms` names layers."""
        return [
            Row(f"{name}-{rows}-{dtype}", {"layer": name, "in": width, "out": out, "length": rows, "dtype": dtype})
            for name, width, out in (self.layers[:2] if settings.quick else self.layers)
            if not settings.forms or name in settings.forms
            for rows in settings.lengths or ((1,) if settings.quick else self.lengths)
            for dtype in settings.dtypes or self.dtypes
        ]

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure all arms on one row."""
        from effcompile import ops
        from effcompile.ops import native

        ops.register()
        native.library(native.ROWS)
        at = row.parameters
        rows, width, out, dtype = int(at["length"]), int(at["in"]), int(at["out"]), str(at["dtype"])
        x = seeded((rows, width), dtype, settings.device, 1)
        first = seeded((out, width), dtype, settings.device, 2)
        count = 2 if settings.quick else max(2, COLD // (first.numel() * first.element_size()))
        weights = [first, *(first.clone() for _ in range(count - 1))]

        def each(layer: Callable[..., Tensor]) -> Callable[[], Callable[[], Tensor]]:
            def call() -> Tensor:
                for weight in weights:
                    found = layer(x, weight, None)
                return found

            return lambda: call

        flops = 2.0 * rows * width * out
        kernels: dict[str, Kernel | str] = {
            "aten": Kernel(each(F.linear), flops),
            "eff-rows": Kernel(each(torch.ops.eff.linear_rows_v1), flops),
            "onednn": Kernel(each(torch.ops.eff.linear_v1), flops),
        }
        chosen = {n: k for n, k in kernels.items() if n in self.chosen_arms(settings)}
        return [table_case.measure(row, chosen, settings, watch, useful_flops=flops, steps=count)]
