"""Summarize repeated measurements: median and spread, and ratios taken round by round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Hold the samples of one quantity in the order of the rounds."""

    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("a spread needs at least one sample")

    @property
    def median(self) -> float:
        """Return the middle value."""
        return statistics.median(self.samples)

    @property
    def iqr(self) -> float:
        """Return the distance between the quartiles (inclusive method); 0 for a single sample."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low

    def scaled(self, factor: float) -> Spread:
        """Return the spread of the samples times `factor`."""
        return Spread(tuple(value * factor for value in self.samples))

    def to_json(self) -> dict[str, Any]:
        """Return median, min, max, iqr and the samples, rounded to 7 digits."""
        return {
            "median": _round(self.median),
            "min": _round(min(self.samples)),
            "max": _round(max(self.samples)),
            "iqr": _round(self.iqr),
            "samples": [_round(value) for value in self.samples],
        }


def ratio(base: Spread, arm: Spread) -> Spread:
    """Return how many times faster `arm` was than `base`, round by round: above 1 the arm wins.

    Pairs are taken within a round because neighbors in time share the machine's state.
    """
    if len(base.samples) != len(arm.samples):
        raise ValueError("ratios need the same rounds on both sides")
    return Spread(tuple(b / a for b, a in zip(base.samples, arm.samples)))


def ratios(spreads: dict[str, Spread], bases: Sequence[str], subjects: Sequence[str]) -> list[dict[str, Any]]:
    """Return the ratio of every other arm to each arm of `bases`, and of each arm of `subjects` to every other arm, as
    JSON values.

    An item reads "`arm` is `median` times as fast as `to`". Arms that were not measured are left out.
    """
    pairs = [(arm, base) for base in bases for arm in spreads if arm != base]
    pairs += [(subject, other) for subject in subjects for other in spreads if other != subject]
    unique = [pair for place, pair in enumerate(pairs) if pair not in pairs[:place]]
    return [
        {"arm": arm, "to": base, **ratio(spreads[base], spreads[arm]).to_json()}
        for arm, base in unique
        if arm in spreads and base in spreads
    ]


def _round(value: float) -> float:
    return float(f"{value:.7g}")
