"""Make the static masks of steps that policies of the family `cache` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effcompile.core.policy import Method, refused_value


def every(numbers: Sequence[int], interval: int, warmup: int, last: int) -> tuple[bool, ...]:
    """Return which steps compute: in each stage the first `warmup`, the `last`, and every `interval`-th between them.

    A stage's first step always computes, since nothing of another size can stand for it.
    """
    found: list[bool] = []
    for count in numbers:
        for step in range(count):
            due = step >= warmup and (step - warmup + 1) % interval == 0
            found.append(step == 0 or step < warmup or step >= count - last or due)
    return tuple(found)


def given(policy: Method, mask: Sequence[int], numbers: Sequence[int]) -> tuple[bool, ...]:
    """Return a mask of 0 and 1 that the user wrote, with the first step of each stage.

    Raises:
        EffError: EFF-U004 where it has another length than the schedule, or another value.
    """
    if len(mask) != sum(numbers) or any(value not in (0, 1) for value in mask):
        raise refused_value(policy, "mask", f"a list of {sum(numbers)} times 0 or 1, one a step")
    firsts = {sum(numbers[:stage]) for stage in range(len(numbers))}
    return tuple(bool(value) or step in firsts for step, value in enumerate(mask))


def check_region(policy: Method) -> None:
    """Raise EFF-U004 unless `region` is one that a cache can keep."""
    value: Any = getattr(policy, "region", None)
    if value not in ("output", "body"):
        raise refused_value(policy, "region", "output or body")
