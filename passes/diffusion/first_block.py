"""Compute the body of a denoiser where its first block changed (first-block cache)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.policy import check_share, check_whole
from effcompile.core.schedule import Caching, StepCache
from effcompile.passes.diffusion.masks import every


@dataclass(frozen=True)
class FirstBlock(StepCache):
    """Run the head each step, and the body only where the head's residual r differs from that of the step computed last.

    mean|r - r'| / mean|r'| is held against `threshold`. Since r' is of a computed step, what was left out does not add up. The
    first `warmup` and the `last` steps of a stage always compute, and so does a step behind `most` that did not. The host reads
    one number a step, which `reuse` with a mask does not need. `order` above 0 extrapolates the residual as `taylor` does.
    """

    threshold: float = 0.08
    order: int = 0
    warmup: int = 3
    last: int = 1
    most: int = 3

    name: ClassVar[str] = "first-block"
    paper: ClassVar[str] = "github.com/chengzeyi/ParaAttention"

    def __post_init__(self) -> None:
        check_share(self, "threshold")
        for field in ("order", "last"):
            check_whole(self, field)
        for field in ("warmup", "most"):
            check_whole(self, field, least=1)

    def caching(self, numbers: Sequence[int]) -> Caching:
        """Return the steps that compute in any case, and the threshold for the others."""
        total = sum(numbers) + 1
        forced = every(numbers, total, self.warmup, self.last)
        return Caching(forced, self.order, "step", "body", self.threshold, self.most)
