"""Turn costs into seconds on a device, and learn from measured points how close a kernel comes to the roofline.

    t = max(FLOP / peak, exps / exp rate, memory bytes / bandwidth, loaded bytes / L2 bandwidth) + calls x overhead

with one efficiency per term. Exponentials are a term of their own because they are not free: an H100 has about 250 FLOP
of matrix units per exponential, so at head width 128 they cost half the matrix time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeAlias

import numpy as np
import sympy

from effcompile.core.errors import EffError, unknown
from effcompile.core.target import Device
from effcompile.cost.symbolic import Cost

Work: TypeAlias = Cost | Sequence[Cost]

TERMS = ("compute", "exp", "memory", "l2")


@dataclass(frozen=True)
class Efficiency:
    """Hold the reached share of each peak (0 to 1, more where a data sheet is beaten) and the seconds per call.

    `overhead` None means the device's own `call_overhead`.
    """

    compute: float = 1.0
    exp: float = 1.0
    memory: float = 1.0
    l2: float = 1.0
    overhead: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self)


# What good kernels reach where nothing was measured: 700 of 989 TFLOP/s for cuDNN attention on H200, 80 to 90 % of the
# memory bandwidth for streaming kernels. An assumption, so whatever uses it stays tagged as modelled.
ASSUMED = Efficiency(compute=0.7, exp=0.8, memory=0.85, l2=0.8)


def time(work: Work, device: Device, dtype: object, efficiency: Efficiency = ASSUMED) -> Any:
    """Return seconds: a float where all sizes are numbers, else a sympy expression.

    Costs in a sequence run one after another; within one cost everything overlaps, which for a kernel of several passes
    is a lower bound. Raises `EFF-T103` where the device has no units for `dtype`.
    """
    costs = (work,) if isinstance(work, Cost) else tuple(work)
    return sum(_time_of(cost, device, dtype, efficiency) for cost in costs)


def bottleneck(cost: Cost, device: Device, dtype: object, efficiency: Efficiency = ASSUMED) -> str:
    """Return the term that decides the time of a cost with numeric sizes: compute, exp, memory or l2."""
    terms = [float(term) for term in _terms(cost, device, dtype, efficiency)]
    return TERMS[terms.index(max(terms))]


def _terms(cost: Cost, device: Device, dtype: object, efficiency: Efficiency) -> tuple[Any, ...]:
    return (
        cost.flops / (efficiency.compute * device.peak(dtype)),
        cost.exps / (efficiency.exp * device.exp_rate),
        cost.moved / (efficiency.memory * device.memory_bandwidth),
        cost.load_bytes / (efficiency.l2 * device.l2_bandwidth),
    )


def _time_of(cost: Cost, device: Device, dtype: object, efficiency: Efficiency) -> Any:
    overhead = device.call_overhead if efficiency.overhead is None else efficiency.overhead
    terms = [sympy.sympify(term) for term in _terms(cost, device, dtype, efficiency)]
    launch = sympy.sympify(cost.calls) * overhead
    if all(term.is_number for term in (*terms, launch)):
        return max(float(term) for term in terms) + float(launch)
    # Unevaluated: sympy would compare the terms pairwise, which takes seconds and decides nothing.
    return sympy.Max(*terms, evaluate=False) + launch


@dataclass(frozen=True)
class Measurement:
    """Hold a measured point: the cost with numbers for all sizes, and its seconds."""

    cost: Cost
    seconds: float


@dataclass(frozen=True)
class Fit:
    """Hold fitted efficiencies and how well they predict a point that they have not seen.

    `error` is the median relative error under leave-one-out. `unseen` names the coefficients that no point says
    anything about, since their term was never the largest; they keep the value of the starting point.
    """

    coefficients: Efficiency
    error: float
    points: int
    unseen: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**dataclasses.asdict(self), "unseen": list(self.unseen)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fit:
        """Build a fit from `to_json`'s value; an unknown field is `EFF-T104`."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                raise unknown("EFF-T104", "field of a fit", key, known)
        return cls(Efficiency(**data["coefficients"]), data["error"], data["points"], tuple(data.get("unseen", ())))


def fit(
    measurements: Sequence[Measurement], device: Device, dtype: object, start: Efficiency = ASSUMED, *, rounds: int = 20
) -> Fit:
    """Fit one efficiency per term and the overhead per call to measured points, by least squares of relative errors.

    The roofline is a maximum, so each round solves the linear problem for the terms that are largest now and looks
    again which those are. Raises `EFF-T105` with fewer than two points or a time that is not positive.
    """
    if len(measurements) < 2 or min(point.seconds for point in measurements) <= 0:
        raise EffError("EFF-T105", "a fit needs at least two measured points, all with a time above zero")
    ideal = Efficiency(overhead=0.0)
    rows = np.array([[float(t) for t in _terms(point.cost, device, dtype, ideal)] for point in measurements])
    calls = np.array([float(point.cost.calls) for point in measurements])
    seconds = np.array([point.seconds for point in measurements])
    first = np.array([1 / start.compute, 1 / start.exp, 1 / start.memory, 1 / start.l2, _overhead(start, device)])
    # From the assumed slopes and from each term as the only one: the alternation finds local optima.
    starts = [first, *(np.where(np.arange(5) == term, first * 100, first) for term in range(4))]
    slopes, seen = _solve(rows, calls, seconds, first, starts, rounds)
    errors = []
    for out in range(len(seconds)):
        keep = np.arange(len(seconds)) != out
        others, _ = _solve(rows[keep], calls[keep], seconds[keep], first, [slopes, first], rounds)
        errors.append(abs(float(_predict(rows[out : out + 1], calls[out : out + 1], others)[0]) / seconds[out] - 1))
    compute, exp, memory, l2, overhead = (float(slope) for slope in slopes)
    unseen = tuple(name for name, known in zip((*TERMS, "overhead"), seen, strict=True) if not known)
    return Fit(
        Efficiency(1 / compute, 1 / exp, 1 / memory, 1 / l2, overhead), float(median(errors)), len(seconds), unseen
    )


def _overhead(efficiency: Efficiency, device: Device) -> float:
    return device.call_overhead if efficiency.overhead is None else efficiency.overhead


def _predict(rows: Any, calls: Any, slopes: Any) -> Any:
    return (rows * slopes[:4]).max(axis=1) + calls * slopes[4]


def _solve(rows: Any, calls: Any, seconds: Any, first: Any, starts: list[Any], rounds: int) -> tuple[Any, list[bool]]:
    """Return the best slopes found (seconds per ideal second, and per call) and which of them the points determine."""
    best, best_seen, best_error = first, [False] * 5, np.inf
    for start in starts:
        slopes = start
        for _ in range(rounds):
            largest = (rows * slopes[:4]).argmax(axis=1)
            design = np.column_stack([np.where(largest == term, rows[:, term], 0.0) for term in range(4)] + [calls])
            found, seen = _positive(design / seconds[:, None], first)
            error = float(np.sum((_predict(rows, calls, found) / seconds - 1) ** 2))
            if error < best_error - 1e-15:
                best, best_seen, best_error = found, seen, error
            if np.allclose(found, slopes, rtol=1e-12, atol=0):
                break
            slopes = found
    return best, best_seen


def _positive(design: Any, first: Any) -> tuple[Any, list[bool]]:
    """Solve `design @ slopes = 1` with slopes above zero, by trying every set of active columns (at most 31).

    Terms left out keep their `first` slope; an overhead left out is zero, which the points then say.
    """
    columns = [column for column in range(5) if design[:, column].any()]
    wanted = np.ones(len(design))
    best, best_error, active = first, np.inf, set[int]()
    for size in range(1, len(columns) + 1):
        for chosen in itertools.combinations(columns, size):
            part = design[:, list(chosen)]
            solution, _, rank, _ = np.linalg.lstsq(part, wanted, rcond=None)
            if rank < size or (solution <= 0).any():
                continue
            error = float(np.sum((part @ solution - wanted) ** 2))
            if error < best_error - 1e-12:
                best = np.where(np.arange(5) < 4, first, 0.0)
                best[list(chosen)] = solution
                best_error, active = error, set(chosen)
    return best, [column in active or (column == 4 and column in columns) for column in range(5)]
