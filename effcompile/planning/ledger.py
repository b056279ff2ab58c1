"""Measure the error that every pass adds, on real inputs.

The program is executed after each pass, next to the captured program and to a run of it in float64. A stage is within
tolerance by the rule of torch's own accuracy checks (`torch._dynamo.utils.same`): its distance to the float64 run is at
most `multiplier` times the distance of the captured program, plus a tenth of the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from effcompile.core.dump import Dump
from effcompile.core.program import Program

MULTIPLIER = 2.0
TOLERANCE = 1e-4
LOW_PRECISION = 1e-2  # tolerance where a result is bfloat16 or float16
_WIDENED = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class Recording(Dump):
    """Keep the program that each stage left, instead of writing it to a folder."""

    stages: list[tuple[str, Program]] = field(default_factory=list)

    def program(self, name: str, program: Program) -> None:
        """Keep a program."""
        self.stages.append((name, program))

    def text(self, name: str, content: str) -> None:
        """Keep no text."""


@dataclass(frozen=True)
class Row:
    """Hold the error after one stage, the largest over all outputs.

    `added` is the largest absolute difference to the stage before, `max_abs` to the captured program; `rmse` is the
    distance to the float64 run and `base_rmse` that of the captured program. NaN and infinities that only one side has
    count as infinite.
    """

    stage: str
    added: float
    max_abs: float
    rmse: float
    base_rmse: float
    within: bool

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; an infinite error is the string `inf`."""
        numbers = {"added": self.added, "max_abs": self.max_abs, "rmse": self.rmse, "base_rmse": self.base_rmse}
        plain = {key: value if math.isfinite(value) else "inf" for key, value in numbers.items()}
        return {"stage": self.stage, **plain, "within": self.within}


@dataclass(frozen=True)
class Ledger:
    """Hold the rows of one graph, in the order of the passes."""

    rows: tuple[Row, ...]
    multiplier: float = MULTIPLIER

    @property
    def within(self) -> bool:
        """Tell whether the last stage is within tolerance."""
        return not self.rows or self.rows[-1].within

    @property
    def culprit(self) -> str | None:
        """Return the first stage out of tolerance."""
        return next((row.stage for row in self.rows if not row.within), None)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        rows = [row.to_json() for row in self.rows]
        return {"multiplier": self.multiplier, "within": self.within, "culprit": self.culprit, "rows": rows}


@dataclass(frozen=True)
class Reference:
    """Hold what the captured program gives on the inputs, in its own dtypes and in float64."""

    outputs: tuple[Any, ...]
    exact: tuple[Any, ...]

    @classmethod
    def of(cls, program: Program, inputs: Sequence[Any]) -> Reference:
        """Run the captured program twice; where no float64 run exists for its ops, the program is its own reference."""
        outputs = execute(program, inputs)
        try:
            exact = execute(program, inputs, widen=True)
        except Exception:  # an op without a float64 kernel, or a dtype that a sub-graph fixes
            exact = outputs
        return cls(outputs, exact)

    def compare(self, name: str, found: Sequence[Any], before: Sequence[Any], multiplier: float = MULTIPLIER) -> Row:
        """Return the row of a stage that gave `found` after one that gave `before`."""
        worst = Row(name, 0.0, 0.0, 0.0, 0.0, True)
        for value, last, base, exact in zip(found, before, self.outputs, self.exact, strict=True):
            if not isinstance(value, torch.Tensor):
                continue
            rmse, base_rmse = distance(value, exact), distance(base, exact)
            tolerance = LOW_PRECISION if value.dtype in (torch.float16, torch.bfloat16) else TOLERANCE
            within = rmse <= multiplier * base_rmse + tolerance / 10
            if not value.is_floating_point() and not value.is_complex():
                within = bool(torch.equal(value, base))
            worst = Row(
                name,
                max(worst.added, largest(value, last)),
                max(worst.max_abs, largest(value, base)),
                max(worst.rmse, rmse),
                max(worst.base_rmse, base_rmse),
                worst.within and within,
            )
        return worst


def measure(stages: Sequence[tuple[str, Program]], inputs: Sequence[Any], multiplier: float = MULTIPLIER) -> Ledger:
    """Execute every stage on `inputs` (real tensors on one device); the first stage is the captured program."""
    assert stages, "a ledger needs the captured program"
    reference = Reference.of(stages[0][1], inputs)
    before: Sequence[Any] = reference.outputs
    rows = []
    for name, program in stages[1:]:
        found = execute(program, inputs)
        rows.append(reference.compare(name, found, before, multiplier))
        before = found
    return Ledger(tuple(rows), multiplier)


def execute(program: Program, inputs: Sequence[Any], widen: bool = False) -> tuple[Any, ...]:
    """Interpret the program's graph; return its outputs, then the inputs as it left them (a write is a result too).

    `widen` computes in float64: every floating input, constant and cast below it is widened.
    """
    (entry,) = program.entries
    packed = [item.value for item in entry.inputs[len(inputs) :]]
    fresh = [_fresh(value, widen) for value in (*inputs, *packed)]
    runner = _InFloat64(entry.graph) if widen else fx.Interpreter(entry.graph)
    with torch.no_grad():
        result = runner.run(*fresh, enable_io_processing=False)
    flat = result if isinstance(result, tuple | list) else (result,)
    return (*flat, *fresh[: len(inputs)])


def _fresh(value: Any, widen: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if widen and value.dtype in _WIDENED:
        return value.detach().to(torch.float64, copy=True)
    return value.detach() if isinstance(value, torch.nn.Parameter) else value.detach().clone()


class _InFloat64(fx.Interpreter):
    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        wide = fx.node.map_aggregate((args, kwargs), _wide)
        return super().call_function(target, *wide)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _wide(super().get_attr(target, args, kwargs))


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value in _WIDENED:
        return torch.float64
    if isinstance(value, torch.Tensor) and value.dtype in _WIDENED:
        return value.to(torch.float64)
    return value


def distance(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the root mean square difference; infinite where one side is not finite and the other differs."""
    if not value.numel():
        return 0.0
    difference = _difference(value, exact)
    return float(difference.square().mean().sqrt())


def largest(value: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest absolute difference."""
    return float(_difference(value, other).abs().max()) if value.numel() else 0.0


def _difference(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if value.shape != other.shape:
        return torch.tensor(math.inf, dtype=torch.float64)
    kind = torch.complex128 if value.is_complex() else torch.float64
    a, b = value.detach().to(kind), other.detach().to(kind)
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, torch.zeros_like(a), a - b).abs()
    return torch.where(gap.isnan(), torch.full_like(gap, math.inf), gap)
