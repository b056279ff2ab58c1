"""Let arms take turns: A B C A B C ..., never A A A B B B."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from bench.clocks import Timer
from bench.stats import Spread

SETTLE = 0.02
"""Seconds of rest before a timed call: the previous arm's threads stop spinning on the cores the next one needs."""

Call = Callable[[], Any]


def interleave(
    calls: Mapping[str, Call],
    timer: Timer,
    rounds: int,
    *,
    warmup: int = 0,
    before: Callable[[str], None] | None = None,
    settle: float = SETTLE,
    tick: Callable[[str], None] | None = None,
) -> dict[str, Spread]:
    """Time every call once a round, in the order given, and return seconds per call.

    Args:
        calls: what to time, by name. A call that raises ends the measurement: it ran before, when it was prepared.
        timer: of the device.
        rounds: timed rounds, at least 1.
        warmup: rounds that are run the same way and thrown away.
        before: untimed preparation of a call (rewinding a cache), given its name.
        settle: seconds of rest before each timed call.
        tick: told the name after every call, for a progress bar.
    """
    if rounds < 1:
        raise ValueError("at least one round")
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            if before is not None:
                before(name)
            if settle:
                time.sleep(settle)
            seconds, result = timer.time(call)
            del result  # gigabytes of logits must be gone before the next arm allocates its own
            if number >= warmup:
                samples[name].append(seconds)
            if tick is not None:
                tick(name)
    return {name: Spread(tuple(values)) for name, values in samples.items()}
