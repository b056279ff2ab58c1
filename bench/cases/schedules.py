"""Measure what schedules and step caches give in time and cost in quality, on denoisers that were trained."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

import effcompile as eff
from bench.case import Case, Row, Settings, Watch
from bench.frechet import Moments, distance, interval, moments
from bench.peers import release
from bench.stats import Spread, ratios
from effcompile.integrations.sampler import PlannedSampler
from effcompile.models import zoo
from effcompile.models.dit import DiT, regions
from effcompile.models.trained_digits_dit import HELD_OUT, NONE, Judge, digits, judge
from effcompile.runtime.sampler import Denoiser

BASELINE = "euler-28"
ARMS: Mapping[str, tuple[str, str]] = {
    **{f"euler-{n}": (f"plain{{steps={n}}}", "") for n in (28, 20, 14, 11, 9, 7, 5, 4, 3)},
    "bottleneck": ("bottleneck{steps=[3,10,6]}", ""),
    "bottleneck-short": ("bottleneck{steps=[2,6,4],terminal=0.05}", ""),
    "predict-x0": ("predict-x0{steps=14,scales=[0.5,1.0],until=[0.5]}", ""),
    "correlated": ("correlated{steps=[10,8],weight=[0.4]}", ""),
    "reuse-2": ("plain{steps=28}", "reuse{interval=2,warmup=2}"),
    "reuse-body-3": ("plain{steps=28}", "reuse{interval=3,warmup=2,region=body}"),
    "first-block": ("plain{steps=28}", "first-block{threshold=0.1}"),
    "taylor-3": ("plain{steps=28}", "taylor{interval=3,warmup=2,axis=level}"),
    "taylor-4": ("plain{steps=28}", "taylor{interval=4,warmup=2,axis=level}"),
    "taylor-6": ("plain{steps=28}", "taylor{interval=6,warmup=2,axis=level}"),
    "taylor2-4": ("plain{steps=28}", "taylor{interval=4,warmup=2,order=2,axis=level}"),
    "x0-taylor-3": ("predict-x0{steps=28,scales=[0.5,1.0],until=[0.4]}", "taylor{interval=3,warmup=2,axis=level}"),
    "correlated-taylor-3": ("correlated{steps=[12,16],weight=[0.4]}", "taylor{interval=3,warmup=2,axis=level}"),
}
"""(schedule, cache) of each arm; those with a stage of half the edges need a model that knows two sizes."""


@dataclass(frozen=True)
class Schedules(Case):
    """Sample with every arm from the same noise, a seed a round, and hold the samples against real digits."""

    name: ClassVar[str] = "schedules"
    title: ClassVar[str] = "Schedules and step caches on trained denoisers of digits"
    about: ClassVar[str] = (
        "A round is one seed: every arm samples as many digits, all classes alike, from the same first noise, through the compiled "
        "denoiser; seconds are those of an image. frechet is the distance to the digits of training in the features of a small "
        "judge, mean and 95 % interval over the seeds; `real` is that of digits that were held out. at_equal_time is what plain "
        "steps of the same time have, read between their arms. apart is the RMS difference to 28 steps from the same noise, over "
        "the RMS of those; with new noise in between it says little."
    )
    headline: ClassVar[bool] = False
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    form_words: ClassVar[tuple[str, ...]] = ("digits-dit-8", "digits-dit-32")
    samples: int = 2000
    batch: int = 100
    shown: Mapping[str, tuple[str, str]] = field(default_factory=lambda: ARMS)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return 28 Euler steps and every other arm."""
        return tuple(self.shown)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return one row a model; lengths are how many samples a seed draws."""
        forms = settings.forms or (self.form_words[:1] if settings.quick else self.form_words)
        counts = settings.lengths or ((self.batch if settings.quick else self.samples),)
        found = []
        for form in forms:
            for count in counts:
                found.append(Row(f"{form}-{count}", {"form": form, "samples": count, "dtype": "float32"}))
        return found

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure one model in this process."""
        torch.set_num_threads(settings.threads)
        release()
        load = [os.getloadavg()[0]]
        form, count = str(row.parameters["form"]), int(row.parameters["samples"])
        edge = int(form.rpartition("-")[2])
        names = [name for name in self.chosen_arms(settings) if edge == 32 or not _halves(*self.shown[name])]
        names = list(dict.fromkeys((BASELINE, *names)))
        whole, parts = _denoisers(edge)
        samplers = {name: _sampler(edge, whole, parts, *self.shown[name]) for name in names}
        seen, (real, _) = judge(edge), digits(edge)
        with torch.no_grad():
            target = moments(seen.features(real[:-HELD_OUT]))
            floor = distance(moments(seen.features(real[-HELD_OUT:])), target)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        scores: dict[str, list[float]] = {name: [] for name in names}
        apart: dict[str, list[float]] = {name: [] for name in names}
        for name, sampler in samplers.items():
            watch.say(f"compiling {name}")
            _draw(sampler, min(count, self.batch), self.batch, 0)
        for seed in range(settings.rounds):
            first: Tensor | None = None
            for name, sampler in samplers.items():
                images, taken = _draw(sampler, count, self.batch, seed)
                first = images if first is None else first
                seconds[name].append(taken / count)
                scores[name].append(_score(images, seen, target))
                apart[name].append(float((images - first).square().mean().sqrt() / first.square().mean().sqrt()))
                watch.tick(name)
        spreads = {name: Spread(tuple(values)) for name, values in seconds.items()}
        plain = {
            name: (_median(seconds[name]), sum(scores[name]) / len(scores[name])) for name in names if _plain(name)
        }
        arms: dict[str, Any] = {}
        for name in names:
            mean, half = interval(scores[name])
            cost = samplers[name].estimate()
            arms[name] = {
                "seconds": spreads[name].to_json(),
                "schedule": self.shown[name][0],
                "cache": self.shown[name][1],
                "frechet": [round(mean, 4), round(half, 4)],
                "at_equal_time": round(at_time(tuple(plain.values()), _median(seconds[name])), 4),
                "apart": round(sum(apart[name]) / len(apart[name]), 4),
                "computed": sum(samplers[name].computed),
                "full_steps": round(cost.full_steps, 3),
            }
        load.append(os.getloadavg()[0])
        return [
            {
                "id": row.id,
                "parameters": dict(row.parameters),
                "rounds": settings.rounds,
                "warmup": 1,
                "load": [round(value, 2) for value in load],
                "real": round(floor, 4),
                "arms": arms,
                "ratios": ratios(spreads, (BASELINE,), ()),
            }
        ]


def _halves(schedule: str, cache: str) -> bool:
    return not schedule.startswith("plain")


def _plain(name: str) -> bool:
    return name.startswith("euler-")


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _denoisers(edge: int) -> tuple[Denoiser, eff.Regions]:
    """Return the compiled model, whole and in regions. Arms share them: Dynamo keeps a few graphs of one function only."""
    model = zoo.load(f"digits-dit-{edge}").model
    assert isinstance(model, DiT)
    whole, *parts = (torch.compile(part, backend="eff", dynamic=False) for part in (model, *regions(model)))
    return whole, eff.Regions(*parts)


def _sampler(edge: int, whole: Denoiser, parts: eff.Regions, schedule: str, cache: str) -> PlannedSampler:
    least = (16, 16) if edge == 32 else None
    of = eff.Denoising((edge, edge), shift=max(1.0, edge / 16), least=least, patch=2, multiple=2, width=96)
    body = "region=body" in cache or cache.startswith("first-block")
    return eff.sampler(parts if body else whole, of, schedule=schedule, cache=cache or None)


def _draw(sampler: PlannedSampler, count: int, batch: int, seed: int) -> tuple[Tensor, float]:
    """Return (images, seconds) of one seed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    labels = torch.arange(batch) % NONE
    begun = time.perf_counter()
    images = [sampler((batch, 1), labels, generator=generator) for _ in range(-(-count // batch))]
    return torch.cat(images)[:count], time.perf_counter() - begun


def _score(images: Tensor, seen: Judge, target: Moments) -> float:
    with torch.no_grad():
        return distance(moments(torch.cat([seen.features(part) for part in images.split(500)])), target)


def at_time(plain: Sequence[tuple[float, float]], seconds: float) -> float:
    """Return the distance that plain steps have at a time, linear in its logarithm between (seconds, distance) of two arms."""
    ordered = sorted(plain)
    if seconds <= ordered[0][0]:
        return ordered[0][1]
    for (early, worse), (late, better) in pairwise(ordered):
        if seconds <= late:
            share = torch.tensor(seconds / early).log() / torch.tensor(late / early).log()
            return float(worse + share * (better - worse))
    return ordered[-1][1]
