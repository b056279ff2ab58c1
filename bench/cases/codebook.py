"""Measure codebook features: all scores and a sort, and one pass over the book; time, and memory above the operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench import table_case
from bench.case import Case, Row, Settings, Watch, grid
from bench.child import peak_of, start_peak
from bench.table_case import Kernel, seeded
from effcompile.models.codebook import Snap

GROUPS, WIDTH, TOP_K = 8, 64, 8
FORMS = {"1000-codes": 1000, "10000-codes": 10_000}
ARMS = {"naive": None, "naive-inductor": "inductor", "eff": "eff"}


@dataclass(frozen=True)
class CodebookCase(Case):
    """Time one snap of the results of 8 attention heads."""

    name: ClassVar[str] = "codebook"
    title: ClassVar[str] = "Codebook features"
    headline: ClassVar[bool] = False
    about: ClassVar[str] = (
        "8 heads of 64, a book of codes for each, 8 codes averaged, random features and codes; `length` is tokens. naive: scores "
        "of all codes, top-k, gather and mean. eff: the same graph with the pass fuse-codebook. `call_bytes`: how far the memory "
        "of the process rises in a call."
    )
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    form_words: ClassVar[tuple[str, ...]] = tuple(FORMS)
    lengths: tuple[int, ...] = (64, 512, 2048)
    dtypes: tuple[str, ...] = ("float32",)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the naive form, plain and compiled, and ours; the first is the baseline."""
        return tuple(ARMS)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return tokens x codes x dtype."""
        forms = ("1000-codes",) if settings.quick else tuple(FORMS)
        return grid(settings, (64,) if settings.quick else self.lengths, forms, self.dtypes)

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure all arms on one snap."""
        torch._dynamo.reset()
        tokens, codes, dtype = (
            int(row.parameters["length"]),
            FORMS[str(row.parameters["form"])],
            str(row.parameters["dtype"]),
        )
        torch.manual_seed(0)
        snap = Snap(GROUPS, WIDTH, codes, TOP_K).eval().to(getattr(torch, dtype))
        x = seeded((1, tokens, GROUPS, WIDTH), dtype, settings.device, 1)
        flops = 2.0 * tokens * GROUPS * WIDTH * codes
        memory: dict[str, int] = {}

        def build(name: str) -> Callable[[], Tensor]:
            run: nn.Module | Callable[..., Tensor] = snap
            if ARMS[name] is not None:
                run = torch.compile(snap, backend=ARMS[name], dynamic=False)
            run(x)
            before, counts = start_peak(settings.device)
            run(x)
            if counts:
                memory[name] = max(1, peak_of(settings.device) - before)
            return lambda: run(x)

        kernels: dict[str, Kernel | str] = {
            name: Kernel(lambda name=name: build(name), flops) for name in self.chosen_arms(settings)
        }
        found = table_case.measure(row, kernels, settings, watch, useful_flops=flops)
        for name, rise in memory.items():
            found["arms"][name]["call_bytes"] = rise
        return [found]
