"""Find the length from which one way of doing the work beats another.

Tiles and rounding make cost curves step, so two of them may cross more than once. All crossings in the range are
found and reported; the one length S* is given only where it is true, that is where b pays at every examined length
from S* up.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import sympy

from effcompile.core.errors import EffError, unknown
from effcompile.core.target import Device
from effcompile.cost.roofline import ASSUMED, Efficiency, Work, time

Direction = Literal["never", "always", "above", "below", "mixed"]
Tag = Literal["modelled", "measured"]


@dataclass(frozen=True)
class Crossover:
    """Say where b pays between `lo` and `hi`.

    `intervals` are the ranges of lengths (ends included) in which b is faster. `length` is S*, the least length from
    which b pays all the way up to `hi`; None where it does not pay at `hi`, and None where it pays everywhere, since
    then the crossover lies below `lo`. `direction`: never, always, above S*, below a length only, or mixed (several
    crossings). `fit_error` is the relative error of the times behind it, None where nothing was measured.
    """

    length: int | None
    direction: Direction
    intervals: tuple[tuple[int, int], ...]
    lo: int
    hi: int
    tag: Tag = "modelled"
    fit_error: float | None = None

    def pays(self, length: int) -> bool:
        """Say whether b is faster at `length`; lengths outside the examined range take the nearest end."""
        inside = min(max(length, self.lo), self.hi)
        return any(start <= inside <= end for start, end in self.intervals)

    def text(self, name: str = "b", symbol: str = "S") -> str:
        """Return one line such as `block path pays above S = 1,830 (modelled, +-18%)`."""
        note = self.tag if self.fit_error is None else f"{self.tag}, +-{self.fit_error:.0%}"
        span = f"{symbol} = {self.lo:,} to {self.hi:,}"
        if self.direction == "never":
            return f"{name} does not pay for {span} ({note})"
        if self.direction == "always":
            return f"{name} pays for all {span} ({note})"
        if self.direction == "above":
            return f"{name} pays above {symbol} = {self.length:,} ({note})"
        if self.direction == "below":
            return f"{name} pays up to {symbol} = {self.intervals[0][1]:,} only ({note})"
        parts = [f"{start:,}..{end:,}" for start, end in self.intervals[:3]]
        more = f" and {len(self.intervals) - 3} more ranges" if len(self.intervals) > 3 else ""
        tail = f", throughout above {self.length:,}" if self.length is not None else ""
        return f"{name} pays for {symbol} = {', '.join(parts)}{more}{tail} ({note})"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**dataclasses.asdict(self), "intervals": [list(pair) for pair in self.intervals]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Crossover:
        """Build a crossover from `to_json`'s value; an unknown field is `EFF-T104`."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                raise unknown("EFF-T104", "field of a crossover", key, known)
        if data["direction"] not in get_args(Direction):
            raise unknown("EFF-T104", "direction of a crossover", str(data["direction"]), get_args(Direction))
        return cls(**{**data, "intervals": tuple((int(start), int(end)) for start, end in data["intervals"])})


def crossover(
    cost_a: Work,
    cost_b: Work,
    symbol: Any,
    lo: int,
    hi: int,
    device: Device,
    dtype: object,
    *,
    efficiency_a: Efficiency = ASSUMED,
    efficiency_b: Efficiency = ASSUMED,
    fit_error: float | None = None,
    samples: int = 2048,
) -> Crossover:
    """Compare two costs, functions of the one free `symbol`, at the whole numbers from `lo` to `hi`.

    Every length is examined where there are at most `samples` of them, else that many spread evenly by ratio, each
    change of sign then narrowed by bisection; a range in which b pays between two neighbouring samples can be missed.
    Raises `EFF-T106` where a cost has another free symbol or the range is empty.
    """
    if not 1 <= lo < hi:
        raise EffError("EFF-T106", f"the range {lo} to {hi} is empty; lengths are whole numbers from 1 up")
    time_a = _function(time(cost_a, device, dtype, efficiency_a), symbol)
    time_b = _function(time(cost_b, device, dtype, efficiency_b), symbol)
    found = _intervals(lambda length: time_a(length) > time_b(length), _lengths(lo, hi, samples))
    return _describe(found, lo, hi, "modelled", fit_error)


def measured_crossover(
    lengths: Sequence[int], seconds_a: Sequence[float], seconds_b: Sequence[float], *, error: float | None = None
) -> Crossover:
    """Compare measured times at increasing `lengths`; between two points both times are power laws of the length.

    `error` is the relative spread of the timings. Raises `EFF-T106` for fewer than two or unordered lengths.
    """
    rows = len(lengths)
    if rows < 2 or len(seconds_a) != rows or len(seconds_b) != rows or list(lengths) != sorted(set(lengths)):
        raise EffError("EFF-T106", "a measured crossover needs two or more increasing lengths with a time of each path")
    gains = [math.log(slow / fast) for slow, fast in zip(seconds_a, seconds_b)]

    def gain(length: int) -> float:
        right = max(1, bisect.bisect_left(lengths, length))
        left = right - 1
        share = math.log(length / lengths[left]) / math.log(lengths[right] / lengths[left])
        return gains[left] + share * (gains[right] - gains[left])

    found = _intervals(lambda length: gain(length) > 0, lengths)
    return _describe(found, lengths[0], lengths[-1], "measured", error)


def _function(seconds: Any, symbol: Any) -> Callable[[int], float]:
    expression = sympy.sympify(seconds)
    if stray := sorted(str(other) for other in expression.free_symbols - {symbol}):
        raise EffError("EFF-T106", f"the cost is not a function of {symbol} alone: {', '.join(stray)} is free")
    compiled = sympy.lambdify(symbol, expression, modules="math")
    return lambda length: float(compiled(length))


def _lengths(lo: int, hi: int, samples: int) -> list[int]:
    if hi - lo < samples:
        return list(range(lo, hi + 1))
    ratio = (hi / lo) ** (1 / (samples - 1))
    return sorted({lo, hi, *(min(hi, max(lo, round(lo * ratio**step))) for step in range(samples))})


def _intervals(pays: Callable[[int], bool], lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return the ranges where b pays, each end exact for the change of sign that it brackets."""
    found: list[tuple[int, int]] = []
    start = lengths[0] if pays(lengths[0]) else None
    for left, right in pairwise(lengths):
        if pays(right) == (start is not None):
            continue
        low, high = left, right  # pays(low) is as before, pays(high) the opposite
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if pays(middle) == (start is not None) else (low, middle)
        if start is None:
            start = high
        else:
            found.append((start, low))
            start = None
    if start is not None:
        found.append((start, lengths[-1]))
    return tuple(found)


def _describe(found: tuple[tuple[int, int], ...], lo: int, hi: int, tag: Tag, fit_error: float | None) -> Crossover:
    if not found:
        return Crossover(None, "never", found, lo, hi, tag, fit_error)
    if found == ((lo, hi),):
        return Crossover(None, "always", found, lo, hi, tag, fit_error)
    length = found[-1][0] if found[-1][1] == hi else None
    if len(found) > 1 or (found[0][0] != lo and length is None):
        direction: Direction = "mixed"
    else:
        direction = "below" if length is None else "above"
    return Crossover(length, direction, found, lo, hi, tag, fit_error)
