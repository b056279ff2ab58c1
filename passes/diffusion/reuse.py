"""Reuse what a step computed in the steps behind it (FORA, static masks)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.policy import check_whole
from effcompile.core.schedule import Caching, StepCache
from effcompile.passes.diffusion.masks import check_region, every, given


@dataclass(frozen=True)
class Reuse(StepCache):
    """Compute every `interval`-th step of a stage, its first `warmup` and its `last` ones; the others take what was computed last.

    `region=body` keeps the residual of the denoiser's body, around which head and tail run each step; `output` keeps the result.
    `mask` of 0 and 1, one a step of the whole schedule, takes the place of the rule. The choice is made before sampling, so no step
    waits for a value. Interval 1 computes everything, bit for bit.
    """

    interval: int = 2
    warmup: int = 3
    last: int = 1
    region: str = "output"
    mask: tuple[int, ...] = ()

    name: ClassVar[str] = "reuse"
    paper: ClassVar[str] = "arXiv:2407.01425"

    def __post_init__(self) -> None:
        check_whole(self, "interval", least=1)
        check_whole(self, "warmup", least=1)
        check_whole(self, "last")
        check_region(self)

    def caching(self, numbers: Sequence[int]) -> Caching:
        """Return the mask."""
        rule = given(self, self.mask, numbers) if self.mask else every(numbers, self.interval, self.warmup, self.last)
        return Caching(rule, region=self.region)  # type: ignore[arg-type]
