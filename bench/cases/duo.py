"""Measure Duo-LLM layers at shares of skipped tokens: masked execution, and dispatch to the tokens of each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bench import table_case
from bench.case import Case, Row, Settings, Watch, grid
from bench.table_case import Kernel, seeded
from effcompile.models.duo import LARGE, SKIP, SMALL, DuoConfig, DuoFFN
from effcompile.models.llama import LlamaConfig

CONFIG = DuoConfig(LlamaConfig(width=512, hidden=2048), small=512)
SHARES = {"skip-0": 0.0, "skip-50": 0.5, "skip-90": 0.9}
ARMS = {"masked": None, "masked-inductor": "inductor", "eff": "eff"}


@dataclass(frozen=True)
class Duo(Case):
    """Time one layer; of the tokens that are not skipped half take the large layer."""

    name: ClassVar[str] = "duo"
    title: ClassVar[str] = "Duo-LLM layers"
    headline: ClassVar[bool] = False
    about: ClassVar[str] = (
        "One feed-forward layer of width 512, large (2,048) or small (512) or none for each token, random weights and choices; "
        "`length` is tokens, the form the share that is skipped. masked: both for every token. eff: the same graph with the pass "
        "dispatch-unequal-experts."
    )
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    form_words: ClassVar[tuple[str, ...]] = tuple(SHARES)
    lengths: tuple[int, ...] = (64, 512, 2048)
    dtypes: tuple[str, ...] = ("float32",)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return masked execution, plain and compiled, and ours; the first is the baseline."""
        return tuple(ARMS)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return tokens x share of skipped tokens x dtype."""
        forms = ("skip-50",) if settings.quick else tuple(SHARES)
        return grid(settings, (64,) if settings.quick else self.lengths, forms, self.dtypes)

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure all arms on one layer."""
        torch._dynamo.reset()
        tokens, form, dtype = int(row.parameters["length"]), str(row.parameters["form"]), str(row.parameters["dtype"])
        torch.manual_seed(0)
        layer = DuoFFN(CONFIG).eval().to(dtype=getattr(torch, dtype), device=settings.device)
        x = seeded((1, tokens, CONFIG.llama.width), dtype, settings.device, 0)
        drawn = torch.rand((1, tokens), generator=torch.Generator().manual_seed(0))
        kept = 1 - SHARES[form]
        choice = torch.where(drawn < kept / 2, LARGE, torch.where(drawn < kept, SMALL, SKIP)).to(settings.device)
        flops = (
            6.0
            * CONFIG.llama.width
            * float((choice == LARGE).sum() * CONFIG.llama.hidden + (choice == SMALL).sum() * CONFIG.small)
        )

        def build(backend: str | None) -> Callable[[], torch.Tensor]:
            run = layer if backend is None else torch.compile(layer, backend=backend, dynamic=False)
            run(x, choice)
            return lambda: run(x, choice)

        kernels: dict[str, Kernel | str] = {
            name: Kernel(lambda name=name: build(ARMS[name]), flops) for name in self.chosen_arms(settings)
        }
        return [table_case.measure(row, kernels, settings, watch, useful_flops=flops)]
