"""Sample high, low and high again (Bottleneck Sampling)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.errors import unknown
from effcompile.core.policy import check_share, check_word, refused_value
from effcompile.core.schedule import Denoising, Entry, Stage, StepSchedule
from effcompile.passes.diffusion.presets import PRESETS
from effcompile.passes.diffusion.stages import check_counts, check_numbers, check_resize, filled, levels_of, own_shift


@dataclass(frozen=True)
class Bottleneck(StepSchedule):
    """Take `steps[k]` steps in stage k: the first and the last one in full size, those between at the share `low` of its edges.

    Each stage goes to data. The next resizes that and mixes it with new noise, down to the level where it begins: `strength[k]` of
    the time, shifted by `shift[k]`; without `shift` by the denoiser's own, in proportion to the edge. `renoise=sigma` mixes in the
    level that the denoiser is told, `strength` the strength itself, as the port does, which tells it more noise than there is.
    `terminal` stretches each stage to end at a level. Adjacent stages of one size are one stage, unless `force_renoise`. `preset`
    gives steps, low, strength, shift and renoise together.
    """

    steps: tuple[int, ...] = (4, 13, 8)
    low: float = 0.5
    strength: tuple[float, ...] = (1.0, 0.8, 0.6)
    shift: tuple[float, ...] = ()
    terminal: float = 0.0
    renoise: str = "sigma"
    resize: str = "lanczos3"
    force_renoise: bool = False
    preset: str = ""

    name: ClassVar[str] = "bottleneck"
    paper: ClassVar[str] = "arXiv:2503.18940"

    def __post_init__(self) -> None:
        check_counts(self, "steps")
        check_share(self, "low")
        check_numbers(self, "strength", len(self.steps), 0, 1)
        if self.strength[0] != 1:
            raise refused_value(self, "strength", "1 in the first stage, which begins with noise alone")
        if self.shift:
            check_numbers(self, "shift", len(self.steps), 0, 1e4)
        check_word(self, "renoise", ("sigma", "strength"))
        check_resize(self)
        if not 0 <= self.terminal < 1:
            raise refused_value(self, "terminal", "at least 0 and below 1")
        if self.preset:
            if self.preset not in PRESETS:
                raise unknown("EFF-U004", "preset of `bottleneck`", self.preset, PRESETS)
            preset = PRESETS[self.preset]
            for field in ("steps", "low", "strength", "shift", "renoise"):
                object.__setattr__(self, field, getattr(preset, field))

    @property
    def origin(self) -> str:
        """Say where a preset comes from."""
        return PRESETS[self.preset].origin if self.preset else ""

    def stages(self, of: Denoising) -> tuple[Stage, ...]:
        """Return the stages."""
        last = len(self.steps) - 1
        sizes = [of.size if number in (0, last) else of.scaled(self.low) for number in range(last + 1)]
        shifts = filled(self.shift, [own_shift(of, size) for size in sizes])
        found: list[Stage] = []
        number = 0
        while number <= last:
            end = number + 1
            while end <= last and sizes[end] == sizes[number] and not self.force_renoise:
                end += 1
            steps, strength = sum(self.steps[number:end]), self.strength[number]
            levels, bottom = levels_of(of, steps, strength, shifts[number], self.terminal)
            noise = strength if self.renoise == "strength" and of.process == "flow" else levels[0]
            enter = Entry("renoise", noise, self.resize) if number else None  # type: ignore[arg-type]
            found.append(Stage(sizes[number], levels, bottom, enter))
            number = end
        return tuple(found)
