"""Extrapolate what steps computed to the steps behind them (TaylorSeer)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.policy import check_whole, check_word
from effcompile.core.schedule import Caching, StepCache
from effcompile.passes.diffusion.masks import check_region, every, given


@dataclass(frozen=True)
class Taylor(StepCache):
    """Compute every `interval`-th step; the others take the polynomial of degree `order` through the last computed ones.

    The polynomial is Newton's, with divided differences over the number of the step (`axis=step`) or its noise level (`level`), and
    passes through the computed values: exact where the feature is a polynomial of that degree. The published series takes backward
    differences for derivatives, which is exact for lines only. As long as fewer steps were computed than the degree needs, the
    degree is lower. Interval 1 computes everything, bit for bit.
    """

    order: int = 1
    interval: int = 4
    warmup: int = 3
    last: int = 1
    axis: str = "step"
    region: str = "output"
    mask: tuple[int, ...] = ()

    name: ClassVar[str] = "taylor"
    paper: ClassVar[str] = "arXiv:2503.06923"

    def __post_init__(self) -> None:
        check_whole(self, "order")
        check_whole(self, "interval", least=1)
        check_whole(self, "warmup", least=1)
        check_whole(self, "last")
        check_word(self, "axis", ("step", "level"))
        check_region(self)

    def caching(self, numbers: Sequence[int]) -> Caching:
        """Return the mask and the degree."""
        rule = given(self, self.mask, numbers) if self.mask else every(numbers, self.interval, self.warmup, self.last)
        return Caching(rule, self.order, self.axis, self.region)  # type: ignore[arg-type]
