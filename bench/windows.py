"""Let arms read windows of real text in turn: what the cases about the quality of policies share."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import Tensor

from bench.clocks import Timer
from bench.rounds import SETTLE
from effcompile.models.entry import ZooModel
from effcompile.models.text import austen_text, pydoc_text, token_windows

Given = TypeVar("Given")


def windows_of(loaded: ZooModel, length: int, rounds: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name of the text, token ids `[1, length]`), the texts in turn."""
    assert loaded.tokenizer is not None
    texts = {"pydoc": pydoc_text(), "austen": austen_text()}
    half = -(-rounds // len(texts))
    cut = {name: token_windows(loaded.tokenizer, text, length, half) for name, text in texts.items()}
    for number in range(rounds):
        name = tuple(texts)[number % len(texts)]
        yield name, cut[name][number // len(texts)][None]


def timed(timer: Timer, call: Callable[[Given], Tensor], given: Given, into: list[float]) -> Tensor:
    """Call once, after a rest; add the seconds to a list and return the result."""
    time.sleep(SETTLE)
    seconds, result = timer.time(lambda: call(given))
    into.append(seconds)
    found: Tensor = result
    return found


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python from collecting garbage within a timed call."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextlib.contextmanager
def many_graphs(count: int) -> Iterator[None]:
    """Let Dynamo keep a graph for each arm of the same code."""
    from torch._dynamo import config

    # Past the limit Dynamo runs eagerly, which would be timed as the policy. A second entry of a policy is the profile's.
    limit = max(count + 2, config.recompile_limit)
    with config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        yield
