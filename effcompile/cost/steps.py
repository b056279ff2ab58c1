"""Say what a schedule costs, against what it is to be compared with.

A figure against 50 steps alone flatters: half of it is the number of steps. So there are three baselines: 50 steps, the
pipeline's own number, and how many plain steps take the same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from effcompile.core.schedule import Denoising, Schedule, Size


@dataclass(frozen=True)
class ScheduleCost:
    """Hold the cost of a run in steps of full size, and in seconds where steps were measured.

    `tag` is `measured` where the seconds of a step in each size were given, else `modelled`.
    """

    full_steps: float
    default_steps: int
    seconds: float | None = None
    tag: str = "modelled"

    @property
    def against_50(self) -> float:
        """Return how many times 50 plain steps take as long."""
        return 50 / self.full_steps

    @property
    def against_default(self) -> float:
        """Return how many times the pipeline's own number of plain steps takes as long."""
        return self.default_steps / self.full_steps

    @property
    def equal_steps(self) -> int:
        """Return how many plain steps take no longer: what quality is to be compared with."""
        return max(1, int(self.full_steps + 1e-9))

    def __str__(self) -> str:
        took = "" if self.seconds is None else f", {self.seconds:.3g} s"
        return (
            f"{self.full_steps:.2f} steps of full size{took} ({self.tag}): {self.against_50:.2f} times as fast as 50 steps, "
            f"{self.against_default:.2f} times as fast as the default {self.default_steps}, as long as {self.equal_steps} of these"
        )


def estimate_schedule(
    schedule: Schedule, of: Denoising, seconds: Mapping[Size, float] | None = None, skipped: float = 0.0
) -> ScheduleCost:
    """Return the cost of a schedule.

    Args:
        schedule: with or without a cache. Steps that a threshold decides count as computed.
        of: the denoiser; without its width tokens are the measure.
        seconds: what one step takes in each size of the schedule and in that of the result, where it was measured.
        skipped: the share of a step that runs where the cached region does not, such as head and tail.
    """
    weight = {size: of.cost(size) / of.cost(of.size) for size in {*schedule.sizes, of.size}}
    if seconds is not None:
        weight = {size: seconds[size] / seconds[of.size] for size in weight}
    caching = schedule.caching
    computed = caching.computed if caching is not None and caching.threshold is None else (True,) * schedule.steps
    full = sum(weight[size] * (1.0 if ran else skipped) for size, ran in zip(schedule.sizes, computed))
    if seconds is None:
        return ScheduleCost(full, of.steps)
    return ScheduleCost(full, of.steps, full * seconds[of.size], "measured")
