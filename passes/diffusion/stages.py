"""Make the levels of a stage, and check what policies of schedules have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from effcompile.core.errors import EffError
from effcompile.core.grids import grid, native_shift
from effcompile.core.policy import Method, check_word, refused_value
from effcompile.core.schedule import Denoising, Resampling, Size

TIMESTEPS = 1000
"""Timesteps of variance preserving processes."""


def levels_of(
    of: Denoising, steps: int, strength: float, shift: float, terminal: float = 0.0
) -> tuple[tuple[float, ...], float]:
    """Return the levels of a stage that goes to data, and the level behind them.

    Raises:
        EffError: EFF-D105 for more steps than the stage has timesteps, or a shift or terminal level where there is none.
    """
    if of.process == "flow":
        return grid(steps, strength, shift, terminal, of.form), 0.0
    if shift != 1 or terminal:
        raise EffError(
            "EFF-D105",
            "a variance preserving process has its noise levels from training: no `shift` and no `terminal`",
            hint="leave them out; the model's own alphas hold its shift",
        )
    first = TIMESTEPS * strength
    if steps > first:
        raise EffError("EFF-D105", f"{steps} steps, and strength {strength:g} leaves {first:g} timesteps")
    # diffusers' `trailing` spacing: the first step begins at the last timestep.
    found = np.round(np.arange(first, 0, -first / steps))[:steps].astype(np.int64) - 1
    return tuple(float(level) for level in found), -1.0


def own_shift(of: Denoising, size: Size) -> float:
    """Return the shift for another size where the user names none."""
    return of.shift if of.process == "vp" else native_shift(of.shift, of.tokens(size), of.tokens(of.size))


def check_numbers(policy: Method, field: str, count: int | None, low: float, high: float) -> None:
    """Raise EFF-U004 unless the field is a list of `count` numbers above `low` and up to `high`."""
    value: Any = getattr(policy, field)
    wanted = f"a list of {'numbers' if count is None else f'{count} numbers'} above {low:g} and at most {high:g}"
    if not isinstance(value, tuple) or (count is not None and len(value) != count):
        raise refused_value(policy, field, wanted)
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int | float) or not low < number <= high:
            raise refused_value(policy, field, wanted)


def check_counts(policy: Method, field: str) -> None:
    """Raise EFF-U004 unless the field is a list of whole numbers of at least 1."""
    value: Any = getattr(policy, field)
    whole = isinstance(value, tuple) and value and all(type(number) is int and number >= 1 for number in value)
    if not whole:
        raise refused_value(policy, field, "a list of whole numbers of at least 1, one a stage")


def check_resize(policy: Method) -> None:
    """Raise EFF-U004 unless `resize` names a resampling."""
    check_word(policy, "resize", get_args(Resampling))


def filled(values: Sequence[float], native: Sequence[float]) -> tuple[float, ...]:
    """Return the values, or what is native where there are none."""
    return tuple(values) or tuple(native)
