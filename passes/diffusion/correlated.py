"""Enlarge what is still noisy, and add the noise that makes it white again (Pyramid Flow, RALU)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.errors import EffError
from effcompile.core.grids import between, grid
from effcompile.core.policy import refused_value
from effcompile.core.schedule import Denoising, Entry, Stage, StepSchedule
from effcompile.passes.diffusion.stages import check_counts, check_numbers, filled, own_shift


@dataclass(frozen=True)
class Correlated(StepSchedule):
    """Take `steps[k]` steps in stage k, each at twice the edges of the one before it; stage k ends with `weight[k]` data in x.

    A stage ends with x = e data + (1 - e) noise. Repeating each value in a 2 x 2 cell repeats its noise too; added noise of
    covariance I - 11^T / z^2 within a cell makes their sum white, at level z (1 - e) / (z (1 - e) + e). No prediction of the data
    is needed. z is 2 or more: below, there is no such noise. Flow matching only. The regions of RALU, which enlarges edges of a
    picture before the rest, are not part of it.
    """

    steps: tuple[int, ...] = (10, 18)
    weight: tuple[float, ...] = (0.4,)
    shift: tuple[float, ...] = ()
    z: float = 2.0

    name: ClassVar[str] = "correlated"
    paper: ClassVar[str] = "arXiv:2410.05954, arXiv:2507.08422"

    def __post_init__(self) -> None:
        check_counts(self, "steps")
        check_numbers(self, "weight", len(self.steps) - 1, 0, 0.999)
        if self.shift:
            check_numbers(self, "shift", len(self.steps), 0, 1e4)
        if not self.z >= 2:
            raise refused_value(
                self, "z", "at least 2: below, the covariance of the added noise has a negative eigenvalue"
            )

    def stages(self, of: Denoising) -> tuple[Stage, ...]:
        """Return the stages."""
        if of.process != "flow":
            raise EffError("EFF-D106", "`correlated` is for flow matching", hint="bottleneck takes both processes")
        last = len(self.steps) - 1
        sizes = [of.scaled(0.5 ** (last - number)) for number in range(last + 1)]
        shifts = filled(self.shift, [own_shift(of, size) for size in sizes])
        found: list[Stage] = []
        level = 1.0
        for number, steps in enumerate(self.steps):
            share = self.weight[number] if number < last else 1.0
            if level <= 1 - share:
                raise EffError(
                    "EFF-D105", f"stage {number} begins at level {level:.3f}, below {1 - share:.3f}, its end"
                )
            if number == 0 and number == last:
                levels, end = grid(steps, 1.0, shifts[0], form=of.form), 0.0
            else:
                levels, end = between(steps, level, 1 - share, shifts[number], of.form)
            enter = Entry("correlated", level, "nearest", self.z) if number else None
            found.append(Stage(sizes[number], levels, end, enter))
            level = self.z * (1 - share) / (self.z * (1 - share) + share)
        return tuple(found)
