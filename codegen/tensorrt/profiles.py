"""Say between which sizes an engine works, and for which it is best: (min, opt, max) shapes by input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from effcompile.core.artifact import TensorInfo
from effcompile.core.errors import EffError, unknown

Span = tuple[int, int, int]
WIDER = 4
"""By default an engine takes sizes from 1 to so many times that of the example call, which it is best for."""


def parse_profiles(text: str) -> list[dict[str, Span]]:
    """Read one or more profiles with `;` between them; an engine runs each call by the first that its sizes lie in."""
    return [parse_profile(part) for part in text.split(";")]


def parse_profile(text: str) -> dict[str, Span]:
    """Read `tokens.0=1:1:8,tokens.1=1:128:2048`, the sizes of an input's dimensions; raises EFF-E166."""
    found: dict[str, Span] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, sign, spans = part.partition("=")
        numbers = spans.split(":")
        if not sign or len(numbers) != 3 or not all(n.isdigit() for n in numbers):
            raise EffError("EFF-E166", f"`{part}` is not INPUT.DIM=MIN:OPT:MAX", hint="--profile tokens.1=1:128:2048")
        low, best, high = map(int, numbers)
        if not 1 <= low <= best <= high:
            raise EffError(
                "EFF-E166", f"`{part}`: 1 <= MIN <= OPT <= MAX does not hold", hint="--profile tokens.1=1:128:2048"
            )
        found[name.strip()] = (low, best, high)
    return found


def profiles(
    inputs: Sequence[TensorInfo], sizes: Mapping[str, int], fixed: Sequence[str], text: str
) -> list[dict[str, list[list[int]]]]:
    """Return the shapes of every profile that the text asks for, as `profile` does; none where nothing varies."""
    made = [profile(inputs, sizes, fixed, asked) for asked in parse_profiles(text)]
    return [shapes for shapes in made if shapes]


def sizes_of(made: Sequence[Mapping[str, list[list[int]]]]) -> list[tuple[str, str]]:
    """Return what an artifact says of its profiles."""
    return [
        (f"sizes of {name}" + (f" ({number + 1})" if len(made) > 1 else ""), " to ".join(map(str, low)))
        for number, shapes in enumerate(made)
        for name, low in shapes.items()
    ]


def profile(
    inputs: Sequence[TensorInfo], sizes: Mapping[str, int], fixed: Sequence[str], asked: Mapping[str, Span]
) -> dict[str, list[list[int]]]:
    """Return (min, opt, max) shapes of every input that varies.

    `sizes` are those of the example call by the name of the size, `fixed` names those that the model holds to others.

    Raises:
        EffError: EFF-E166 where `asked` names a dimension that does not vary, or one size in two ways.
    """
    places = {f"{x.name}.{d}": size for x in inputs for d, size in enumerate(x.shape) if isinstance(size, str)}
    spans = {name: (n, n, n) if name in fixed else (1, n, WIDER * n) for name, n in sizes.items()}
    given: dict[str, Span] = {}
    for place, span in asked.items():
        if place not in places:
            raise unknown("EFF-E166", "dimension that varies", place, places)
        size = places[place]
        if size not in sizes or size in fixed or given.setdefault(size, span) != span:
            raise EffError(
                "EFF-E166",
                f"`{place}` is held to another size ({size}) and cannot be given alone",
                hint=f"give all dimensions of that size alike, or those of {', '.join(sizes) or 'none'}",
            )
        spans[size] = span
    found = {}
    for x in inputs:
        if any(isinstance(size, str) for size in x.shape):
            found[x.name] = [
                [_value(size, {s: span[k] for s, span in spans.items()}) for size in x.shape] for k in range(3)
            ]
    return found


def _value(size: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    if size in sizes:
        return sizes[size]
    import sympy

    return int(sympy.sympify(size, locals={name: sympy.Integer(n) for name, n in sizes.items()}))
