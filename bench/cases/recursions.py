"""Measure Mixture-of-Recursions: every token through all recursions and a mask, and each recursion on its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import table_case
from bench.case import Case, Row, Settings, Watch, grid
from bench.table_case import Kernel
from effcompile.models.llama import LlamaConfig
from effcompile.models.recursions import RecursionConfig, Recursions

FORMS = {"2-recursions": 2, "3-recursions": 3, "4-recursions": 4}
DEPTH = 24
"""Layers that a token of full depth passes between the first and the last one, whatever the number of recursions."""
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "masked": ("eff", {"disable": ("prune-queries",)}),
    "masked-inductor": ("inductor", {}),
    "eff": ("eff", {}),
}


@dataclass(frozen=True)
class RecursionsCase(Case):
    """Time a prefill; all arms are given one routing, that of the model."""

    name: ClassVar[str] = "recursions"
    title: ClassVar[str] = "Mixture-of-Recursions, prefill"
    headline: ClassVar[bool] = False
    about: ClassVar[str] = (
        "A decoder of width 512 (8 heads, feed-forward 1,536), random weights: a first and a last layer, and 24 layers deep "
        "between them, made by 2, 3 or 4 recursions of one stack that share keys; `length` is tokens, batch 1. masked: the stack "
        "on every token in each recursion, and a mask, compiled here without the pass prune-queries. eff: with it. All arms are "
        "given the routing of the model (expert-choice, shares falling to 1/R), so that results can be compared."
    )
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    form_words: ClassVar[tuple[str, ...]] = tuple(FORMS)
    lengths: tuple[int, ...] = (512, 2048)
    dtypes: tuple[str, ...] = ("float32",)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return masked execution, by us and by TorchInductor, and ours; the first is the baseline."""
        return tuple(ARMS)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return tokens x recursions x dtype."""
        forms = ("3-recursions",) if settings.quick else tuple(FORMS)
        return grid(settings, (64,) if settings.quick else self.lengths, forms, self.dtypes)

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure all arms on one model."""
        torch._dynamo.reset()
        length, recursions = int(row.parameters["length"]), FORMS[str(row.parameters["form"])]
        torch.manual_seed(0)
        depth = recursions if settings.quick else DEPTH
        llama = LlamaConfig(vocab=4096, width=512, layers=2 + depth, heads=8, kv_heads=8, hidden=1536, max_seq=length)
        model = Recursions(RecursionConfig(llama, recursions)).eval().to(getattr(torch, str(row.parameters["dtype"])))
        tokens = torch.randint(0, llama.vocab, (1, length), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            routing = model.route(tokens)
            with FlopCounterMode(display=False) as counter:
                model(tokens, routing)
        flops = float(counter.get_total_flops())

        def build(backend: str, options: dict[str, Any]) -> Callable[[], Tensor]:
            given = {"strict": True, **options} if backend == "eff" else None
            run = torch.compile(model, backend=backend, dynamic=False, options=given)
            return lambda: run(tokens, routing)

        # Rates are those of masked execution in every arm: what the result stands for, not what it took.
        kernels: dict[str, Kernel | str] = {
            name: Kernel(lambda name=name: build(*ARMS[name]), flops) for name in self.chosen_arms(settings)
        }
        return [table_case.measure(row, kernels, settings, watch, useful_flops=flops)]
