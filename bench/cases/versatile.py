"""Measure VersatileFFN layers: the authors' spelling and one graph of fixed shapes, and what the compiler makes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench import table_case
from bench.case import Case, Row, Settings, Watch, grid
from bench.table_case import Kernel, seeded
from effcompile.models.llama import LlamaConfig
from effcompile.models.versatile import VersatileConfig, VersatileFFN

SIZES = {"versatile-512": VersatileConfig(LlamaConfig(width=512, hidden=1408))}
ARMS = {  # name: (spelling, backend of torch.compile or None)
    "gathered": ("gathered", None),
    "gathered-inductor": ("gathered", "inductor"),
    "static-inductor": ("static", "inductor"),
    "eff": ("static", "eff"),
}


@dataclass(frozen=True)
class Versatile(Case):
    """Time one layer with random routers: about 2.5 of 4 loops a token."""

    name: ClassVar[str] = "versatile"
    title: ClassVar[str] = "VersatileFFN layers"
    headline: ClassVar[bool] = False
    about: ClassVar[str] = (
        "One feed-forward layer, up to 4 loops and 8 virtual experts of which 2 run, random weights and routing; `length` is "
        "tokens. gathered: the authors' block, whose loops and experts ask the host. static-inductor: all loops and experts for "
        "every token. eff: the same graph with the pass fold-virtual-experts."
    )
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    form_words: ClassVar[tuple[str, ...]] = tuple(SIZES)
    lengths: tuple[int, ...] = (64, 512, 2048)
    dtypes: tuple[str, ...] = ("float32",)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the authors' block, compiled spellings, and ours; the first is the baseline."""
        return tuple(ARMS)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return tokens x sizes x dtype."""
        return grid(settings, (64,) if settings.quick else self.lengths, tuple(SIZES), self.dtypes)

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure all arms on one layer."""
        torch._dynamo.reset()
        tokens, form, dtype = int(row.parameters["length"]), str(row.parameters["form"]), str(row.parameters["dtype"])
        config = SIZES[form]
        torch.manual_seed(0)
        layer = VersatileFFN(config).eval().to(dtype=getattr(torch, dtype), device=settings.device)
        x = seeded((1, tokens, config.llama.width), dtype, settings.device, 0)
        product = 6.0 * tokens * config.llama.width * config.llama.hidden
        with torch.no_grad():
            loops = float(layer.depth_router(x).argmax(-1).float().mean()) + 1
        kernels: dict[str, Kernel | str] = {
            name: Kernel(lambda name=name: _call(layer, x, *ARMS[name]), product * loops)
            for name in self.chosen_arms(settings)
        }
        return [table_case.measure(row, kernels, settings, watch, useful_flops=product * loops)]


def _call(layer: VersatileFFN, x: Tensor, form: str, backend: str | None) -> Callable[[], Tensor]:
    own = copy.deepcopy(layer)
    own.config = replace(own.config, form=form)  # type: ignore[arg-type]
    run: Callable[[Tensor], Tensor] = own if backend is None else torch.compile(own, backend=backend, dynamic=False)
    run(x)
    return lambda: run(x)
