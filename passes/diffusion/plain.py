"""Sample in one size, as the denoiser's own pipeline does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.policy import Exactness, check_whole
from effcompile.core.schedule import Denoising, Stage, StepSchedule
from effcompile.passes.diffusion.stages import levels_of


@dataclass(frozen=True)
class Plain(StepSchedule):
    """Take `steps` steps at the size of the result with the denoiser's own shift; 0 takes the number of its pipeline.

    Bit for bit what diffusers' Euler (flow matching) computes from the same noise, and DDIM where the steps divide the timesteps.
    """

    steps: int = 0

    name: ClassVar[str] = "plain"
    paper: ClassVar[str] = ""
    exactness: ClassVar[Exactness] = "bit-equal"

    def __post_init__(self) -> None:
        check_whole(self, "steps")

    def stages(self, of: Denoising) -> tuple[Stage, ...]:
        """Return one stage."""
        levels, end = levels_of(of, self.steps or of.steps, 1.0, of.shift)
        return (Stage(of.size, levels, end),)
