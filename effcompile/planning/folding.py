"""Write many paths of a module tree as one."""

from __future__ import annotations

import re
from collections.abc import Sequence


def fold(names: Sequence[str]) -> str:
    """Write `layers.0.attn, layers.1.attn, layers.3.attn` as `layers.{0-1,3}.attn`."""
    shapes: dict[str, list[int]] = {}
    for name in names:
        found = re.search(r"(?<![\w])\d+(?![\w])", name)
        shape = name if found is None else f"{name[: found.start()]}\0{name[found.end() :]}"
        shapes.setdefault(shape, []).append(-1 if found is None else int(found[0]))
    return ", ".join(
        shape.replace("\0", str(numbers[0]) if len(numbers) == 1 else f"{{{_spans(numbers)}}}")
        for shape, numbers in shapes.items()
    )


def _spans(numbers: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
