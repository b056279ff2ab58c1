"""Check and time the Triton kernels on a GPU beside cuDNN, FlashAttention and FlexAttention.

Every arm is compared with float64 on sampled rows first, and one that is not within the rule is not timed. Rows come in
the order of their worth; those that the time does not suffice for are skipped and say so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from bench import gpu_problems
from bench.case import Case, Row, Settings, Watch
from bench.clocks import timer_for
from bench.gpu_arms import Rotating
from bench.gpu_problems import Layer, Problem
from bench.peers import release
from bench.rounds import interleave
from bench.stats import Spread, ratios

ARMS = ("cudnn", "flash", "flex", "eff", "eff-best")


@dataclass(frozen=True)
class GpuAttention(Case):
    """Time each kernel of codegen/triton at the sizes of one layer of an 8B model."""

    name: ClassVar[str] = "gpu-attention"
    title: ClassVar[str] = "Attention on a GPU"
    headline: ClassVar[bool] = False
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    about: ClassVar[str] = (
        "One layer, 32 query and 8 key/value heads, causal, bfloat16; operands rotate, so none is in L2. dense: the kept "
        "half counts as FLOP. sparse: random blocks of 128 with diagonal and first column. decode: 16 sequences, one "
        "token, pages of 16. scores: the estimators beside our dense attention. eff is the default config of our kernel, "
        "eff-best the fastest of its others."
    )
    form_words: ClassVar[tuple[str, ...]] = ("dense", "sparse", "decode", "scores", "int8")
    dtype_words: ClassVar[tuple[str, ...]] = ("bfloat16",)
    lengths: tuple[int, ...] = (8192, 32768, 2048, 4096, 16384, 65536)
    densities: tuple[float, ...] = (1.0, 0.5, 0.25, 0.12, 0.06, 0.03)
    head_dims: tuple[int, ...] = (64, 72, 80, 96, 192, 256)
    budgets: tuple[int, ...] = (1024, 4096)
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    sequences: int = 16
    seconds: float = 330.0
    begun: list[float] = field(default_factory=list, compare=False)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the arms that every kind of row may have; cuDNN's dense attention is the baseline."""
        return ARMS

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return the rows, the most telling first; `--forms` names kinds, `--lengths` lengths."""
        lengths = settings.lengths or ((2048,) if settings.quick else self.lengths)
        densities = (0.25,) if settings.quick else self.densities
        dims = () if settings.quick or settings.lengths else self.head_dims
        found: list[tuple[str, dict[str, Any]]] = []
        for n in lengths:
            found.append((f"dense-{n}", {"form": "dense", "length": n}))
            found += [(f"sparse-{n}-{d}", {"form": "sparse", "length": n, "density": d}) for d in densities]
            found += [(f"decode-{n}-{b}", {"form": "decode", "length": n, "budget": b}) for b in self.budgets if b < n]
            found.append((f"scores-{n}", {"form": "scores", "length": n}))
            found.append((f"int8-{n}", {"form": "int8", "length": n}))
        found[2:2] = [(f"dense-8192-d{d}", {"form": "dense", "length": 8192, "head_dim": d}) for d in dims]
        return [Row(name, at) for name, at in found if not settings.forms or at["form"] in settings.forms]

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Check every arm of a row against float64, then let those that agree take turns."""
        from effcompile import ops

        ops.register()
        names = self.chosen_arms(settings)
        if not self.begun:
            self.begun.append(time.monotonic())
        if self.seconds and time.monotonic() - self.begun[0] > self.seconds:
            return [skipped(row, settings, names, self.seconds)]
        release()
        with torch.no_grad():
            return [take_turns(self.problem(row, settings.device), row, names, settings, watch)]

    def problem(self, row: Row, device: str) -> Problem:
        """Set up a row."""
        at = row.parameters
        n, form = int(at["length"]), at["form"]
        layer = Layer(self.heads, self.kv_heads, int(at.get("head_dim", self.head_dim)), device)
        if form == "sparse":
            return gpu_problems.sparse(layer, n, float(at["density"]))
        if form == "decode":
            return gpu_problems.decode(layer, n, int(at["budget"]), self.sequences)
        whole: dict[str, Callable[[Layer, int], Problem]] = {
            "dense": gpu_problems.dense,
            "scores": gpu_problems.scores,
            "int8": gpu_problems.int8,
        }
        return whole[str(form)](layer, n)


def skipped(row: Row, settings: Settings, names: Sequence[str], seconds: float) -> dict[str, Any]:
    """Return a row for which no time was left."""
    return _row(row, settings, {name: {"skipped": f"the {seconds:.0f} s of the case were over"} for name in names}, {})


def take_turns(problem: Problem, row: Row, names: Sequence[str], settings: Settings, watch: Watch) -> dict[str, Any]:
    """Check the arms of a problem, time those that agree with float64, and return the row."""
    wanted = {name: arm for name, arm in problem.arms.items() if name in names or name not in ARMS}
    others = problem.others if "eff-best" in names else {}
    known: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name, arm in {**wanted, **others}.items():
        watch.say(f"checking {name}")
        known[name], agrees = arm.check(problem.sets[0])
        if agrees and arm.run is not None:
            calls[name] = Rotating(arm.run, problem.sets)
    timer = timer_for(settings.device)
    spreads = interleave(calls, timer, settings.rounds, warmup=settings.warmup, settle=0.0, tick=watch.tick)
    arms = {name: {**known[name], **_timed(spreads.get(name), problem.flops)} for name in wanted}
    timed = {name: spreads.pop(name) for name in others if name in spreads}
    if timed:
        best = min(timed, key=lambda name: timed[name].median)
        medians = {name: float(f"{spread.median:.4g}") for name, spread in timed.items()}
        told = {"config": best, "configs": medians}
        arms["eff-best"] = {**known[best], **_timed(timed[best], problem.flops), **told}
        spreads["eff-best"] = timed[best]
    elif others:
        arms["eff-best"] = {"error": "no other config agrees with float64"}
    wrong = {name: known[name] for name in others if name not in timed}
    return {**_row(row, settings, arms, spreads), **problem.told, **({"wrong": wrong} if wrong else {})}


def _timed(spread: Spread | None, flops: float) -> dict[str, Any]:
    if spread is None:
        return {}
    rate = {"gflops": float(f"{flops / spread.median / 1e9:.5g}")} if flops else {}
    return {"seconds": spread.to_json(), **rate}


def _row(row: Row, settings: Settings, arms: Mapping[str, Any], spreads: dict[str, Spread]) -> dict[str, Any]:
    return {
        "id": row.id,
        "parameters": dict(row.parameters),
        "rounds": settings.rounds,
        "warmup": settings.warmup,
        "load": [round(os.getloadavg()[0], 2)],
        "arms": dict(arms),
        "ratios": ratios(spreads, [name for name in ("cudnn", "flash", "eff") if name in spreads][:1], ()),
    }
