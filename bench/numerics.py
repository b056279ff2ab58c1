"""Compare an arm's output with a more precise run of the same module.

The rule is the one of torch's own compiler benchmarks: an arm passes when its root mean square error against the
float64 run is at most `m` times that of eager in the same dtype, plus a tenth of a tolerance; `m` is 2 for float32 and
3 for narrower types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_RULE = {torch.float32: (2.0, 1e-4), torch.bfloat16: (3.0, 1e-2), torch.float16: (3.0, 1e-3)}


@dataclass(frozen=True)
class Reference:
    """Hold the precise output, eager's output in the dtype of the row, and what the precise one was computed in."""

    precise: Tensor
    eager: Tensor
    kind: str
    dtype: torch.dtype

    def compare(self, output: Tensor) -> dict[str, Any]:
        """Return the errors of `output` and whether they are within the rule, as JSON values.

        `max_error` is max |difference| / max |reference|; `rmse` is absolute, in the unit of the output. `within` is
        None where the reference is no more precise than eager.
        """
        if output.shape != self.precise.shape:
            return {"reference": self.kind, "within": False, "problem": f"shape {tuple(output.shape)}"}
        mine, base = rmse(output, self.precise), rmse(self.eager, self.precise)
        factor, tolerance = _RULE[self.dtype]
        allowed = factor * base + tolerance / 10
        blind = self.kind == str(self.dtype).removeprefix("torch.")
        finite = bool(torch.isfinite(output).all())
        return {
            "reference": self.kind,
            "max_error": _short(max_error(output, self.precise)),
            "rmse": _short(mine),
            "eager_rmse": _short(base),
            "allowed_rmse": None if blind else _short(allowed),
            "within": None if blind and finite else finite and mine <= allowed,
        }


def rmse(output: Tensor, reference: Tensor) -> float:
    """Return the root mean square difference, computed in float64; NaN where either holds one."""
    return float((output.double() - reference.double()).square().mean().sqrt())


def max_error(output: Tensor, reference: Tensor) -> float:
    """Return max |difference| / max |reference|."""
    wide = reference.double()
    return float((output.double() - wide).abs().max() / wide.abs().max().clamp(min=torch.finfo(torch.float64).tiny))


def _short(value: float) -> float | str:
    return float(f"{value:.4g}") if value == value and abs(value) != float("inf") else str(value)
