"""Keep what computed steps of a sampling loop gave, and say what stands for it in steps that do not compute.

The polynomial through the last values is in Newton's form: divided differences over the places of the computed steps, which may
lie at any distances. Nothing is carried over a transition, where sizes change.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effcompile.core.schedule import Caching
from effcompile.runtime.trajectory import WalkStep

Values = tuple[Tensor, ...]


class StepMemory:
    """Hold the divided differences of one region in one run."""

    def __init__(self, caching: Caching) -> None:
        self.caching = caching
        self.reset()

    def reset(self) -> None:
        """Forget everything, as at the begin of a run and of each stage."""
        self.places: list[float] = []
        self.values: list[Values] = []
        self.differences: list[Values] = []
        self.probe: Tensor | None = None
        self.skipped = 0

    def place(self, step: WalkStep) -> float:
        """Return where a step lies on the axis of the polynomial."""
        return float(step.number) if self.caching.axis == "step" else step.level

    def computes(self, step: WalkStep, probe: Tensor | None = None) -> bool:
        """Tell whether a step computes; `probe` is the residual of the head, where a threshold asks for it."""
        caching = self.caching
        if caching.computed[step.number] or not self.values:
            return True
        if caching.threshold is None:
            return False
        if probe is None or self.probe is None or self.skipped >= caching.most:
            return True
        changed = (probe - self.probe).abs().mean() / self.probe.abs().mean()
        return not bool(changed < caching.threshold)  # also where nothing can be compared, as with a residual of zeros

    def note(self, step: WalkStep, values: Values, probe: Tensor | None = None) -> None:
        """Take the values of a computed step."""
        keep = self.caching.order + 1
        self.places = [self.place(step), *self.places][:keep]
        self.values = [values, *self.values][:keep]
        self.differences, self.probe, self.skipped = _newton(self.places, self.values), probe, 0

    def recall(self, step: WalkStep) -> Values:
        """Return what stands for the values at a step that does not compute."""
        self.skipped += 1
        found, product, place = self.differences[0], 1.0, self.place(step)
        if len(self.differences) == 1:
            return found  # the very tensors: reuse is exact
        for before, difference in zip(self.places, self.differences[1:]):
            product *= place - before
            found = tuple(total + product * part for total, part in zip(found, difference))
        return tuple(total.to(value.dtype) for total, value in zip(found, self.values[0]))


def _newton(places: Sequence[float], values: Sequence[Values]) -> list[Values]:
    """Return the divided differences of the newest value with 0, 1, ... values before it, above the first in float32 or wider."""
    if len(values) == 1:
        return [values[0]]
    table = [tuple(part if part.element_size() >= 4 else part.float() for part in value) for value in values]
    found = [table[0]]
    for reach in range(1, len(table)):
        table = [
            tuple((new - old) / (places[n] - places[n + reach]) for new, old in zip(table[n], table[n + 1]))
            for n in range(len(table) - 1)
        ]
        found.append(table[0])
    return found
