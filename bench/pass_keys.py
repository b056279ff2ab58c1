"""Look for pass keys: the longest prompts in which the dense model finds them, and how many each policy finds at that length."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import Watch
from bench.clocks import timer_for
from bench.quality import Found, Hunt, hunts
from bench.rounds import SETTLE
from bench.stats import Spread
from effcompile.models.entry import ZooModel
from effcompile.models.text import austen_text

ENOUGH = 0.8
"""The share of keys that the dense model has to find at a length for the length to mean something."""
BATCH = 4
"""Prompts in one call: they have one length."""

Call = Callable[..., Tensor]
"""Take ids `[B, S]` and `logits_to_keep`, return the logits of so many last positions."""


@dataclass(frozen=True)
class Search:
    """Hold the length that was found, and what the dense model found at each length that was tried: (found, tries)."""

    length: int
    tried: Mapping[int, tuple[int, int]]


def longest(loaded: ZooModel, dense: Call, lengths: Sequence[int], tries: int, watch: Watch) -> Search:
    """Return the longest of some lengths at which the dense model finds enough keys, or the shortest where it finds enough at none.

    A length is left as soon as too many keys are missed.
    """
    tried: dict[int, tuple[int, int]] = {}
    for length in sorted(lengths, reverse=True):
        count = Found()
        for batch in _batches(loaded, length, tries):
            watch.say(f"dense, {length:,} tokens: {count.found} of {count.tries}")
            _look(dense, batch, count)
            if count.tries - count.found > (1 - ENOUGH) * tries:
                break
        tried[length] = (count.found, count.tries)
        if count.tries == tries and count.found >= ENOUGH * tries:
            return Search(length, tried)
    return Search(min(lengths), tried)


def measure(
    loaded: ZooModel, calls: Mapping[str, Call], length: int, tries: int, watch: Watch
) -> tuple[dict[str, dict[str, Any]], dict[str, Spread]]:
    """Let every arm read every prompt, in turns; seconds are those of one prompt."""
    counts = {name: Found() for name in calls}
    timer = timer_for("cpu")
    samples: dict[str, list[float]] = {name: [] for name in calls}
    batches = _batches(loaded, length, tries)
    for name, call in calls.items():
        watch.say(f"compiling {name}")
        for batch in {len(batch): batch for batch in batches}.values():
            _look(call, batch, Found())
    for batch in batches:
        for name, call in calls.items():
            time.sleep(SETTLE)
            seconds, _ = timer.time(partial(_look, call, batch, counts[name]))
            samples[name].append(seconds / len(batch))
            watch.tick(name)
    spreads = {name: Spread(tuple(values)) for name, values in samples.items()}
    arms = {name: {"seconds": spreads[name].to_json(), "pass_key": counts[name].to_json()} for name in calls}
    return arms, spreads


def _batches(loaded: ZooModel, length: int, tries: int) -> list[list[Hunt]]:
    prompts = list(hunts(loaded.tokenizer, austen_text(), length, tries))
    return [prompts[begin : begin + BATCH] for begin in range(0, len(prompts), BATCH)]


def _look(call: Call, batch: Sequence[Hunt], count: Found) -> None:
    """Read some prompts in one call and count the keys that are found; only the logits of the answers are made."""
    last = max(hunt.answer for hunt in batch) + 1
    logits = call(torch.cat([hunt.ids for hunt in batch]), logits_to_keep=last)
    for number, hunt in enumerate(batch):
        count.add(hunt, logits[number : number + 1])
