"""Measure arms of the case schedules: what they take in turns, and how far what they draw is from real digits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bench.case import Watch
from bench.clocks import timer_for
from bench.frechet import distance, moments
from bench.manifest import scrub
from bench.rounds import interleave
from bench.schedule_arms import ARMS, BASELINE, Samplers, draw, fitting
from bench.stats import Spread, ratios
from effcompile.core.errors import EffError
from effcompile.integrations.sampler import PlannedSampler
from effcompile.models.trained_digits_dit import HELD_OUT, digits, judge

Json = dict[str, Any]


def times(edge: int, names: Sequence[str], batch: int, rounds: int, warmup: int, watch: Watch) -> Json:
    """Let the arms take turns, a batch each; seconds are those of an image."""
    names = list(dict.fromkeys((BASELINE, *fitting(names, edge))))
    made = Samplers(edge)
    samplers: dict[str, PlannedSampler] = {}
    arms: Json = {}
    for name in names:
        watch.say(f"compiling {name}")
        try:
            found = made.make(name)
            draw(found, batch, torch.Generator().manual_seed(0))
        except EffError as error:
            arms[name] = {"error": scrub(f"{error.code} {error.message}")}
            continue
        samplers[name] = found
    calls = {name: partial(_draw, sampler, batch) for name, sampler in samplers.items()}
    taken = interleave(calls, timer_for("cpu"), rounds, warmup=warmup, tick=watch.tick)
    spreads = {name: spread.scaled(1 / batch) for name, spread in taken.items()}
    for name, sampler in samplers.items():
        cost = sampler.estimate()
        arms[name] = {
            "seconds": spreads[name].to_json(),
            "policy": ARMS[name].spelled,
            "plain": ARMS[name].plain,
            "computed": sum(sampler.computed),
            "steps": len(sampler.computed),
            "full_steps": round(cost.full_steps, 3),
        }
    return {"arms": arms, "ratios": ratios(spreads, (BASELINE,), ())}


def _draw(sampler: Any, batch: int) -> None:
    draw(sampler, batch, torch.Generator().manual_seed(0))


def quality(edge: int, names: Sequence[str], seed: int, count: int, batch: int, watch: Watch) -> Json:
    """Draw `count` digits by each arm with one seed, and return their distance to those of training.

    `apart` is the RMS difference of the first batch to the baseline's from the same noise, over the RMS of those.
    """
    seen, (real, _) = judge(edge), digits(edge)
    with torch.no_grad():
        target = moments(seen.features(real[:-HELD_OUT]))
        floor = distance(moments(seen.features(real[-HELD_OUT:])), target)
    made = Samplers(edge)
    arms: Json = {}
    first = draw(made.make(BASELINE), batch, torch.Generator().manual_seed(seed))
    for name in fitting(names, edge):
        sampler, generator = made.make(name), torch.Generator().manual_seed(seed)
        images, seconds = [], []
        try:
            for part in range(-(-count // batch)):
                watch.say(f"{name}, {part * batch} of {count}")
                begun = time.perf_counter()
                images.append(draw(sampler, batch, generator))
                seconds.append((time.perf_counter() - begun) / batch)
        except EffError as error:
            arms[name] = {"error": scrub(f"{error.code} {error.message}")}
            continue
        watch.tick(name)
        with torch.no_grad():
            features = torch.cat([seen.features(part) for part in images])[:count]
        change = (images[0] - first).square().mean().sqrt() / first.square().mean().sqrt()
        arms[name] = {
            "seconds": Spread(tuple(seconds)).to_json(),
            "policy": ARMS[name].spelled,
            "plain": ARMS[name].plain,
            "frechet": float(f"{distance(moments(features), target):.6g}"),
            "apart": round(float(change), 4),
        }
    return {"arms": arms, "ratios": [], "real": float(f"{floor:.6g}")}
