"""Make the grids of noise levels that samplers walk along: shifts of time, and the stretch to a last level.

In flow matching x = (1 - s) data + s noise, and the level s goes from 1 to 0. All arithmetic is float32 as diffusers' scheduler
does it (FlowMatchEulerDiscreteScheduler), so that a schedule of one stage has its levels bit for bit.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np

ShiftForm = Literal["rational", "exponential"]
FORMS: tuple[str, ...] = get_args(ShiftForm)


def shifted(levels: Any, shift: float, form: ShiftForm = "rational") -> Any:
    """Return s u / (1 + (s - 1) u) of float32 levels u: signal over noise becomes 1/s^2 of what it was.

    The two forms are one function; `exponential` rounds as schedulers with dynamic shifting do, whose parameter is log(s).
    """
    if form == "exponential":
        return shift / (shift + (1 / levels - 1) ** 1.0)
    return shift * levels / (1 + (shift - 1) * levels)


def stretched(levels: Any, terminal: float) -> Any:
    """Return falling levels moved away from 1 in proportion, so that the last one is `terminal`."""
    rest = 1 - levels
    return 1 - rest / (rest[-1] / (1 - terminal))


def grid(
    steps: int, strength: float = 1.0, shift: float = 1.0, terminal: float = 0.0, form: ShiftForm = "rational"
) -> tuple[float, ...]:
    """Return the levels at which a denoiser is asked in `steps` steps from `strength` on; the level behind the last one is 0.

    Strength is a share of unshifted time, and the shift comes after it. `terminal` above 0 stretches the levels to end there.
    """
    found = shifted(np.linspace(strength, strength / steps, steps).astype(np.float32), shift, form)
    if terminal and found[-1] < 1:  # a single step from noise alone has nothing to stretch
        found = stretched(found, terminal)
    return tuple(float(level) for level in found.astype(np.float32))


def between(
    steps: int, begin: float, end: float, shift: float, form: ShiftForm = "rational"
) -> tuple[tuple[float, ...], float]:
    """Return the levels of `steps` steps from level `begin` to level `end`, even in unshifted time, and the level behind them."""
    first, last = (float(shifted(np.float32(level), 1 / shift)) for level in (begin, end))
    found = shifted(np.linspace(first, last, steps + 1).astype(np.float32)[:-1], shift, form)
    return (begin, *(float(level) for level in found.astype(np.float32)[1:])), end


def native_shift(shift: float, tokens: float, native_tokens: float) -> float:
    """Return the shift for another number of image tokens: proportional to the edge (arXiv:2403.03206, section 5.3.2)."""
    return shift * math.sqrt(tokens / native_tokens)
