"""Sample low first, and go on at full size from a prediction of the data (ProRes of Jenga)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.errors import EffError
from effcompile.core.policy import check_whole, refused_value
from effcompile.core.schedule import Denoising, Entry, Stage, StepSchedule
from effcompile.passes.diffusion.stages import check_numbers, check_resize, filled, levels_of, own_shift


@dataclass(frozen=True)
class PredictX0(StepSchedule):
    """Take one grid of `steps` steps in rising sizes: stage k at `scales[k]` of the edges up to the share `until[k]` of the steps.

    The last step of a stage predicts the data, x - sigma v, with the level that v was asked at; that is resized and mixed with new
    noise down to the next level of the grid, whose shift is `shift[k]`, or the denoiser's own in proportion to the edge. The number
    of steps does not change. 0 steps are those of the denoiser's pipeline.
    """

    steps: int = 0
    scales: tuple[float, ...] = (0.75, 1.0)
    until: tuple[float, ...] = (0.5,)
    shift: tuple[float, ...] = ()
    resize: str = "bilinear"

    name: ClassVar[str] = "predict-x0"
    paper: ClassVar[str] = "arXiv:2505.16864"

    def __post_init__(self) -> None:
        check_whole(self, "steps")
        check_numbers(self, "scales", None, 0, 1)
        check_numbers(self, "until", len(self.scales) - 1, 0, 1)
        if list(self.until) != sorted(set(self.until)) or 1 in self.until:
            raise refused_value(self, "until", "rising shares below 1")
        if self.shift:
            check_numbers(self, "shift", len(self.scales), 0, 1e4)
        check_resize(self)

    def stages(self, of: Denoising) -> tuple[Stage, ...]:
        """Return the stages; those of one size follow each other as one, with its shift."""
        steps = self.steps or of.steps
        cuts = [0, *(round(share * steps) for share in self.until), steps]
        sizes = [of.scaled(scale) for scale in self.scales]
        shifts = filled(self.shift, [own_shift(of, size) for size in sizes])
        found: list[Stage] = []
        first = 0
        for number, size in enumerate(sizes):
            if number < len(sizes) - 1 and sizes[number + 1] == size:
                continue
            begin, end = cuts[first], cuts[number + 1]
            if begin >= end:
                raise EffError("EFF-D105", f"stage {number} has no step: `until={list(self.until)}` of {steps}")
            levels, bottom = levels_of(of, steps, 1.0, shifts[first])
            enter = Entry("renoise", levels[begin], self.resize) if found else None  # type: ignore[arg-type]
            found.append(Stage(size, levels[begin:end], bottom, enter))
            first = number + 1
        return tuple(found)
