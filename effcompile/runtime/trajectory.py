"""Walk along a schedule: one step after the other, from stage to stage, with the noise of the user's generator.

`Trajectory` holds no tensor and knows no denoiser: a loop of ours and the loop of a pipeline both ask it what comes after a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.core.schedule import Schedule, Size, Stage
from effcompile.runtime.processes import DiffusionProcess
from effcompile.runtime.resize import cell_noise, resize

Generators: TypeAlias = "torch.Generator | list[torch.Generator] | None"


@dataclass(frozen=True)
class WalkStep:
    """Say what one step is: its stage, the level where the denoiser is asked, and the level behind it."""

    number: int
    stage: int
    level: float
    after: float
    first: bool
    last: bool


def draw(shape: tuple[int, ...], generator: Generators, like: Tensor) -> Tensor:
    """Draw float32 noise on the generator's device and bring it to that of `like`; a list has one generator for each row."""
    if isinstance(generator, list):
        rows = [draw((1, *shape[1:]), one, like) for one in generator]
        return torch.cat(rows)
    place = generator.device if generator is not None else like.device
    return torch.randn(shape, generator=generator, device=place, dtype=torch.float32).to(like.device)


class Trajectory:
    """Move latents `[B, C, *size]` along a schedule."""

    def __init__(self, schedule: Schedule, process: DiffusionProcess) -> None:
        self.schedule, self.process = schedule, process
        steps: list[WalkStep] = []
        for number, stage in enumerate(schedule.stages):
            ends = (*stage.levels[1:], stage.end)
            for place, (level, after) in enumerate(zip(stage.levels, ends)):
                steps.append(WalkStep(len(steps), number, level, after, place == 0, place == len(stage.levels) - 1))
        self.steps = tuple(steps)

    def advance(self, step: WalkStep, x: Tensor, out: Tensor, generator: Generators) -> Tensor:
        """Return what the next step begins with: x one step later, in the next stage's size behind a stage's last step.

        Raises:
            EffError: EFF-D107 where the denoiser gave another shape, or numbers that are not finite at the end of a stage.
        """
        size: Size = self.schedule.stages[step.stage].size
        if out.shape != x.shape or tuple(x.shape[-len(size) :]) != size:
            raise EffError(
                "EFF-D107",
                f"step {step.number}: latents {list(x.shape)}, the denoiser's answer {list(out.shape)}, the stage {list(size)}",
                hint="the denoiser returns what it is given, in shape; learnt variances must be cut off",
            )
        x = self.process.step(x, out, step.level, step.after)
        if not step.last:
            return x
        if not bool(torch.isfinite(x).all()):
            raise EffError(
                "EFF-D107", f"stage {step.stage} ended with numbers that are not finite; nothing was returned"
            )
        if step.stage + 1 == len(self.schedule.stages):
            return x
        return self.enter(x, self.schedule.stages[step.stage], self.schedule.stages[step.stage + 1], generator)

    def enter(self, x: Tensor, before: Stage, stage: Stage, generator: Generators) -> Tensor:
        """Return the beginning of a stage from the end x of the one before it, in x's dtype."""
        assert stage.enter is not None, "a later stage says how it begins"
        how, (height, width) = stage.enter, stage.size[-2:]
        kept = resize(x, height, width, how.resize)
        noise = draw(tuple(kept.shape), generator, kept)
        if how.kind == "renoise":
            return self.process.noised(kept, noise, how.noise).to(x.dtype)
        # x = e data + (1 - e) noise, and the noise is the same in a cell: b x + a n' has white noise at level a.
        weight = 1 - before.end
        scale = how.z * (1 - weight) + weight
        return (kept / scale + how.noise * cell_noise(noise, how.z)).to(x.dtype)
