"""Measure the dispatches of experts on CPU over tokens, sizes and dtypes: what the planner's prices are read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench import table_case
from bench.case import Case, Row, Settings, Watch
from bench.table_case import Kernel, seeded
from effcompile.core.experts import ExpertsCall, MoESite
from effcompile.core.site import Refusal
from effcompile.core.target import Target
from effcompile.lowering.moe.batched import Batched, fetched
from effcompile.lowering.moe.dense import Dense, everywhere
from effcompile.lowering.moe.fused import Fused
from effcompile.lowering.moe.grouped import Grouped, by_groups
from effcompile.lowering.moe.price import roofline, weights
from effcompile.targets.detect import detect_cpu

LAYERS = {  # experts, top_k, hidden, inner
    "narrow": (32, 4, 512, 256),
    "wide": (8, 2, 1024, 1792),
}
DISPATCHES = {"fused": Fused(), "batched": Batched(), "grouped": Grouped(), "dense": Dense()}
BODIES = {"batched": fetched, "grouped": by_groups, "dense": everywhere}
FETCHED = 1e9  # bytes of weights that batched products may fetch
GATE = ("silu", "concat", False, "out", 1.0, 0.0, 0.0)
INPUTS = 8  # steps of a timed call of few tokens; a step hardly meets the experts of the step before


@dataclass(frozen=True)
class MoETable(Case):
    """Time each dispatch of lowering/moe on the experts of one layer, after routing."""

    name: ClassVar[str] = "moe-table"
    title: ClassVar[str] = "Dispatches of experts"
    headline: ClassVar[bool] = False
    adds_arms: ClassVar[bool] = True
    about: ClassVar[str] = (
        "GFLOP/s over the chosen experts, random data and routing; `length` is tokens; of few, a call is eight steps in a row. "
        "fused: the C++ kernel of eff::moe_v1. batched, grouped, dense: weights fetched for each choice, tokens sorted by "
        "expert, all experts on all tokens, each as a graph that TorchInductor compiled. What a dispatch declines is left out."
    )
    form_words: ClassVar[tuple[str, ...]] = tuple(LAYERS)
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    lengths: tuple[int, ...] = (1, 8, 64, 512, 2048)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the dispatches; our kernel is the baseline."""
        return tuple(DISPATCHES)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return tokens x layer x dtype; `--forms` names layers."""
        lengths = settings.lengths or ((8,) if settings.quick else self.lengths)
        forms = settings.forms or (("narrow",) if settings.quick else tuple(LAYERS))
        names = ("experts", "top_k", "hidden", "inner")
        return [
            Row(f"{n}-{form}-{dtype}", {"length": n, "form": form, **dict(zip(names, LAYERS[form])), "dtype": dtype})
            for n in lengths
            for form in forms
            for dtype in settings.dtypes or self.dtypes
        ]

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure the dispatches that answer for the row's site."""
        from effcompile import ops

        ops.register()
        torch._dynamo.reset()
        site, target = site_of(row), Target(detect_cpu())
        slots = int(row.parameters["length"]) * site.top_k
        flops = 2.0 * slots * weights(site)
        operands = _operands(site, settings.device)
        kernels: dict[str, Kernel | str] = {}
        for name in self.chosen_arms(settings):
            answer = DISPATCHES[name].supports(site, target)
            size = slots * weights(site) * operands[1][0].element_size()
            if isinstance(answer, Refusal):
                kernels[name] = str(answer)
            elif name == "batched" and size > FETCHED:
                kernels[name] = f"it would fetch {size / 1e9:.1f} GB of weights"
            else:
                build = lambda name=name: _call(name, *operands)  # noqa: E731
                kernels[name] = Kernel(build, flops, {"roofline": roofline(name, site, target.device)})
        from torch._dynamo import config as dynamo

        with dynamo.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
            steps = len(operands[0])
            return [table_case.measure(row, kernels, settings, watch, useful_flops=flops, steps=steps)]


def site_of(row: Row) -> MoESite:
    """Return the site that a row stands for."""
    at = row.parameters
    sizes = {name: int(at[name]) for name in ("experts", "top_k", "hidden", "inner")}
    return MoESite("a", "moe", "forward", "", "op", tokens=int(at["length"]), dtype=str(at["dtype"]), **sizes)


Routed = tuple[Tensor, Tensor, Tensor]


def _operands(site: MoESite, device: str) -> tuple[list[Routed], tuple[Tensor, Tensor]]:
    """Return tokens with their experts, several times, and the weights."""
    tokens = int(site.tokens)
    routed = []
    for seed in range(INPUTS if tokens < 64 else 1):
        scores = torch.rand((tokens, site.experts), generator=torch.Generator().manual_seed(seed))
        shares, ids = scores.softmax(1).topk(site.top_k, 1)
        x = seeded((tokens, site.hidden), site.dtype, device, seed)
        routed.append((x, ids.to(device), (shares / shares.sum(1, keepdim=True)).to(x)))
    w1 = seeded((site.experts, 2 * site.inner, site.hidden), site.dtype, device, 100).mul_(site.hidden**-0.5)
    w2 = seeded((site.experts, site.hidden, site.inner), site.dtype, device, 101).mul_(site.inner**-0.5)
    return routed, (w1, w2)


def _call(name: str, routed: Sequence[Routed], pair: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    w1, w2 = pair
    gate = dict(zip(("act", "layout", "transposed", "side", "alpha", "beta", "limit"), GATE))
    call = ExpertsCall(*[None] * 7, **gate)  # type: ignore[arg-type]

    def written(x: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
        return BODIES[name](x, ids, shares, w1, None, w2, None, call)

    def op(x: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
        found: Tensor = torch.ops.eff.moe_v1(x, ids, shares, w1, None, w2, None, *GATE)
        return found

    run = torch.compile(op if name == "fused" else written, dynamic=False)

    def steps() -> Tensor:
        for operands in routed:
            found = run(*operands)
        return found

    steps()  # compile
    return steps
