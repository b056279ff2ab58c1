"""Check and time the experts of a layer on a GPU: our kernels beside torch's grouped and batched products and transformers'."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from bench.case import Case, Row, Settings, Watch
from bench.cases.gpu_attention import skipped, take_turns
from bench.gpu_experts import ARMS, LAYERS, problem
from bench.peers import release

TUNED = (1, 64, 4096)
"""Numbers of tokens at which the other configs of our kernels are timed: each is compiled first."""


@dataclass(frozen=True)
class GpuMoE(Case):
    """Time the experts of one layer, after routing, from one token to a prefill of 16,384."""

    name: ClassVar[str] = "gpu-moe"
    title: ClassVar[str] = "Experts of a layer on a GPU"
    headline: ClassVar[bool] = False
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    about: ClassVar[str] = (
        "Experts of one layer at the sizes of known models, bfloat16, random data, even routing; `length` is tokens, and several "
        "inputs with other experts take turns. eff: blocks of rows of one expert each, default config; eff-best the fastest of the "
        "others; eff-int8, eff-fp8: weights in 8 bits. grouped_mm, batched_mm: tokens sorted by expert, and weights fetched for "
        "each choice, with torch's products under torch.compile; hf-grouped, hf-batched: transformers' own, likewise. Every arm "
        "is compared with float64 on some tokens first."
    )
    form_words: ClassVar[tuple[str, ...]] = tuple(LAYERS)
    dtype_words: ClassVar[tuple[str, ...]] = ("bfloat16",)
    lengths: tuple[int, ...] = (4096, 1, 64, 16384, 8, 512)
    seconds: float = 300.0
    begun: list[float] = field(default_factory=list, compare=False)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return our kernels and their peers."""
        return ARMS

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return a row for each model and number of tokens, the most telling first."""
        lengths = settings.lengths or ((64,) if settings.quick else self.lengths)
        forms = settings.forms or (tuple(LAYERS)[:1] if settings.quick else tuple(LAYERS))
        return [Row(f"{form}-{n}", {"form": form, "length": n}) for n in lengths for form in forms]

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Check every arm of a row against float64, then let those that agree take turns."""
        from effcompile import ops

        ops.register()
        torch._dynamo.reset()
        names = self.chosen_arms(settings)
        if not self.begun:
            self.begun.append(time.monotonic())
        if self.seconds and time.monotonic() - self.begun[0] > self.seconds:
            return [skipped(row, settings, names, self.seconds)]
        release()
        layer, tokens = LAYERS[str(row.parameters["form"])], int(row.parameters["length"])
        with torch.no_grad():
            made = problem(layer, tokens, settings.device, names, tokens in TUNED)
            return [take_turns(made, row, names, settings, watch)]
