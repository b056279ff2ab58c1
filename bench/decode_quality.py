"""Score policies for decode: the true continuation is fed token by token to a cache that the dense model filled."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import Watch
from bench.clocks import timer_for
from bench.quality import Score
from bench.rounds import SETTLE
from bench.stats import Spread
from bench.workload import Function, primary
from effcompile.models.entry import ZooModel

STEPS = 64
DENSE = "dense"


def measure(
    loaded: ZooModel,
    functions: Mapping[str, Function],
    windows: Iterator[tuple[str, Tensor]],
    length: int,
    watch: Watch,
) -> tuple[dict[str, dict[str, Any]], dict[str, Spread]]:
    """Let every arm take the steps after the first `length` tokens of each window `[1, length + steps]`, in turns.

    Seconds are those of one step. The first of `functions` is the dense one, with whose logits the others' are compared. All arms
    write into one cache, each over what the one before it wrote.
    """
    from transformers import StaticCache

    timer = timer_for("cpu")
    scores: dict[str, dict[str, Score]] = {name: {} for name in functions}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    compiled = False
    for text, ids in windows:
        cache: Any = StaticCache(config=loaded.model.config, max_cache_len=ids.shape[1])
        watch.say(f"prefill of {length:,} tokens")
        loaded.model(ids[:, :length], past_key_values=cache, use_cache=True, logits_to_keep=1)
        for name, function in functions.items() if not compiled else ():
            watch.say(f"compiling {name}")
            _steps(function, ids[:, : length + 2], length, cache)
        compiled = True
        dense: Tensor | None = None
        for name, function in functions.items():
            time.sleep(SETTLE)
            seconds, logits = timer.time(partial(_steps, function, ids, length, cache))
            samples[name].append(seconds / (ids.shape[1] - length))
            dense = logits if dense is None else dense
            scores[name].setdefault(text, Score()).add(logits, dense, ids[0, length:])
            watch.tick(name)
    spreads = {name: Spread(tuple(values)) for name, values in samples.items()}
    quality = {name: {text: score.to_json() for text, score in found.items()} for name, found in scores.items()}
    return {name: {"seconds": spreads[name].to_json(), "quality": quality[name]} for name in functions}, spreads


def _steps(function: Function, ids: Tensor, length: int, cache: Any) -> Tensor:
    """Rewind the cache to the prompt, feed the tokens behind it one by one, and return their logits `[steps, V]`."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)
    logits = []
    for place in range(length, ids.shape[1]):
        out = function(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        logits.append(primary(out)[0, -1:].clone())
    return torch.cat(logits)
