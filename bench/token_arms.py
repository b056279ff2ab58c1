"""Compile a model in arms that differ in the token policy, let them take turns on batches, and compare what they return."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import Watch
from bench.clocks import timer_for
from bench.stats import Spread
from bench.windows import many_graphs, timed

Batch = Mapping[str, Tensor]


@dataclass
class Turns:
    """Hold what arms returned for all batches, one after the other, and what each took: seconds a batch, and to compile."""

    found: dict[str, Tensor] = field(default_factory=dict)
    spreads: dict[str, Spread] = field(default_factory=dict)
    compile_seconds: dict[str, float] = field(default_factory=dict)


def take_turns(
    model: nn.Module,
    arms: Mapping[str, Mapping[str, Any]],
    batches: Callable[[], Iterable[Batch]],
    watch: Watch,
) -> Turns:
    """Compile the model with the options of each arm and give every batch to every arm, a round a batch.

    The model is called once before it is compiled: transformers installs hooks in its first call, at which a graph would break.
    """
    turns, timer = Turns(), timer_for("cpu")
    first = next(iter(batches()))
    samples: dict[str, list[float]] = {name: [] for name in arms}
    parts: dict[str, list[Tensor]] = {name: [] for name in arms}
    calls: dict[str, Callable[[Batch], Tensor]] = {}
    with torch.no_grad(), many_graphs(len(arms)):
        model(**{name: value[:1] for name, value in first.items()})
        for name, options in arms.items():
            watch.say(f"compiling {name}")
            begun = time.perf_counter()
            calls[name] = _compiled(model, options)
            calls[name](first)
            turns.compile_seconds[name] = float(f"{time.perf_counter() - begun:.4g}")
        for given in batches():
            for name, call in calls.items():
                parts[name].append(timed(timer, call, given, samples[name]).float())
                watch.tick(name)
    turns.spreads = {name: Spread(tuple(values)) for name, values in samples.items()}
    turns.found = {name: torch.cat(values) for name, values in parts.items()}
    return turns


def token_options(policy: str) -> dict[str, Any]:
    """Return the options of an arm: a policy behind every attention where it can be, or the exact path."""
    return {"tokens": policy, "require": {"tokens": "all"}} if policy else {}


def _compiled(model: nn.Module, options: Mapping[str, Any]) -> Callable[[Batch], Tensor]:
    run = torch.compile(model, backend="eff", options={"strict": True, **options}, dynamic=False)
    return lambda given: run(**given)


def points(right: Tensor, base: Tensor) -> dict[str, float]:
    """Return the share of right answers `[N]` bool, and its paired difference to `base` in points with a 95 % interval."""
    difference = (right.double() - base.double()) * 100
    half = 1.96 * float(difference.std()) / len(difference) ** 0.5
    mean = float(difference.mean())
    values = {
        "accuracy": float(right.double().mean()),
        "points": mean,
        "points_low": mean - half,
        "points_high": mean + half,
    }
    return {name: round(value, 4) for name, value in values.items()}


def chosen(names: Sequence[str], bases: Sequence[str], quick: Sequence[str] | None) -> list[str]:
    """Return the arms to run, the baselines first; a quick run takes those of `quick` alone."""
    wanted = [name for name in names if name not in bases and (quick is None or name in quick)]
    return [*bases, *wanted]
