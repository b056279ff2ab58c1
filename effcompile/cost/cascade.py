"""Count the passes an einsum cascade makes over a rank (FuseMax, MICRO 2024, arXiv 2406.10491).

A pass ends where every element of a fiber must have been seen before any may be read again. No mapping and no fusion
removes it, and two einsums in different passes cannot be one loop over that rank. The count is derived here from who
reads what, so a new spelling of attention needs a cascade and nothing else.

A cascade is written one einsum a line, `OUT[ranks] = expression over NAME[ranks]`, for example

    GM[p] = max(QK[m,p])            a rank on the right and not on the left is reduced
    RM[m1,p] = max(RM[m1-1,p], LM[m1,p])     a recurrence: reads what the tile before has left
    AV[f,p] = RV[f,m1:end,p]                 what the last tile has left

The fiber is the rank that is swept, or its split `(m1, m0)` with the outer one first. A tensor that has all ranks of
the fiber is too large for the chip; one that has the outer rank only (a value per tile) is not, and is free to read
again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy

_TENSOR = re.compile(r"([A-Za-z]\w*)\[([^\]]*)\]")
_RANK = re.compile(r"^([A-Za-z]\w*?)(?:([+-])(\d+))?$")


@dataclass(frozen=True)
class Access:
    """Name a tensor and the ranks it is indexed by.

    `ahead` is true where elements further along are read: a forward shift (`m1+1`) or the final element (`m1:end`,
    which is one element and so no rank of the iteration).
    """

    tensor: str
    ranks: tuple[str, ...]
    ahead: bool = False

    @classmethod
    def parse(cls, tensor: str, text: str) -> Access:
        """Read the inside of `T[m1-1,p]`."""
        ranks, ahead = [], False
        for part in filter(None, (piece.replace(" ", "") for piece in text.split(","))):
            if part.endswith(":end"):
                ahead = True
                continue
            match = _RANK.match(part)
            if match is None:
                raise ValueError(f"cannot read the rank `{part}` of {tensor}[{text}]")
            ranks.append(match[1])
            ahead = ahead or (match[2] == "+" and int(match[3]) > 0)
        return cls(tensor, tuple(ranks), ahead)


@dataclass(frozen=True)
class Einsum:
    """Compute one tensor from others; `text` is the right-hand side as written."""

    out: Access
    inputs: tuple[Access, ...]
    text: str

    @classmethod
    def parse(cls, line: str) -> Einsum:
        """Read `OUT[ranks] = expression`; raises ValueError where the line is none."""
        left, equals, right = line.partition("=")
        outs = [Access.parse(*found) for found in _TENSOR.findall(left)]
        inputs = tuple(Access.parse(*found) for found in _TENSOR.findall(right))
        if not equals or len(outs) != 1 or not inputs:
            raise ValueError(f"not an einsum: {line.strip()!r}")
        return cls(outs[0], inputs, right.strip())

    @property
    def space(self) -> tuple[str, ...]:
        """Return the ranks that are iterated."""
        return tuple(dict.fromkeys(rank for access in (self.out, *self.inputs) for rank in access.ranks))


@dataclass(frozen=True)
class Cascade:
    """Hold einsums in order and the fiber (outer rank first) whose passes are asked for."""

    name: str
    fiber: tuple[str, ...]
    einsums: tuple[Einsum, ...]

    @classmethod
    def parse(cls, name: str, fiber: tuple[str, ...], text: str) -> Cascade:
        """Read one einsum per line."""
        return cls(name, fiber, tuple(Einsum.parse(line) for line in text.strip().splitlines()))


@dataclass(frozen=True, order=True)
class _Ready:
    """Say when a tensor may be read: while pass `number` runs, or (`complete`) only when all of it is over."""

    number: int
    complete: bool


def sweeps(cascade: Cascade) -> tuple[int, ...]:
    """Return for each einsum the pass it runs in, 0 where it touches no whole fiber."""
    made = {einsum.out.tensor for einsum in cascade.einsums}
    ready: dict[str, _Ready] = {}
    numbers = []
    for einsum in cascade.einsums:
        needs = [_Ready(0, True)]
        for access in einsum.inputs:
            if access.tensor == einsum.out.tensor:
                if access.ahead:
                    raise ValueError(f"{cascade.name}: {access.tensor} reads its own later elements")
                continue
            if access.tensor in made and access.tensor not in ready:
                raise ValueError(f"{cascade.name}: {access.tensor} is read before it is computed")
            when = ready.get(access.tensor, _Ready(0, True))
            # An element further along the fiber exists only after the sweep that makes it.
            needs.append(_Ready(when.number, True) if access.ahead else when)
        need = max(needs)
        touched = (einsum.out, *einsum.inputs)
        sweeping = any(set(cascade.fiber) <= set(access.ranks) for access in touched)
        number = need.number + (1 if sweeping and need.complete else 0)
        reduced = cascade.fiber[0] not in einsum.out.ranks
        ready[einsum.out.tensor] = _Ready(number, reduced or (need.complete and not sweeping))
        numbers.append(number if sweeping else 0)
    return tuple(numbers)


def count_passes(cascade: Cascade) -> int:
    """Return the least number of passes over the cascade's fiber, for any mapping and fusion."""
    return max(sweeps(cascade))


def operations(cascade: Cascade, operation: str, extents: Mapping[str, Any]) -> Any:
    """Return how often `operation` (`exp`, `max` or `/`) is evaluated, given the extent of every rank."""
    total: Any = sympy.Integer(0)
    for einsum in cascade.einsums:
        times = len(re.findall(r"/" if operation == "/" else rf"\b{re.escape(operation)}\(", einsum.text))
        total += times * sympy.prod([extents[rank] for rank in einsum.space]) if times else 0
    return total


# Ranks: e head width of q and k, f of v, p query, m key; m is split into m1 tiles of m0 keys where a method needs it.
THREE_PASS = Cascade.parse(
    "materialized",
    ("m",),
    """
    QK[m,p] = sum(Q[e,p] * K[e,m])
    GM[p] = max(QK[m,p])
    SN[m,p] = exp(QK[m,p] - GM[p])
    SD[p] = sum(SN[m,p])
    A[m,p] = SN[m,p] / SD[p]
    AV[f,p] = sum(A[m,p] * V[f,m])
    """,
)

THREE_PASS_DEFERRED = Cascade.parse(
    "materialized, deferred division",
    ("m",),
    """
    QK[m,p] = sum(Q[e,p] * K[e,m])
    GM[p] = max(QK[m,p])
    SN[m,p] = exp(QK[m,p] - GM[p])
    SD[p] = sum(SN[m,p])
    NV[f,p] = sum(SN[m,p] * V[f,m])
    AV[f,p] = NV[f,p] / SD[p]
    """,
)

TWO_PASS = Cascade.parse(
    "local maximum",
    ("m1", "m0"),
    """
    QK[m1,m0,p] = sum(Q[e,p] * K[e,m1,m0])
    LM[m1,p] = max(QK[m1,m0,p])
    SL[m1,m0,p] = exp(QK[m1,m0,p] - LM[m1,p])
    LD[m1,p] = sum(SL[m1,m0,p])
    GM[p] = max(LM[m1,p])
    PM[m1,p] = exp(LM[m1,p] - GM[p])
    SD[p] = sum(LD[m1,p] * PM[m1,p])
    A[m1,m0,p] = SL[m1,m0,p] * PM[m1,p] / SD[p]
    AV[f,p] = sum(A[m1,m0,p] * V[f,m1,m0])
    """,
)

ONE_PASS = Cascade.parse(
    "running maximum",
    ("m1", "m0"),
    """
    QK[m1,m0,p] = sum(Q[e,p] * K[e,m1,m0])
    LM[m1,p] = max(QK[m1,m0,p])
    RM[m1,p] = max(RM[m1-1,p], LM[m1,p])
    PM[m1,p] = exp(RM[m1-1,p] - RM[m1,p])
    SL[m1,m0,p] = exp(QK[m1,m0,p] - RM[m1,p])
    LD[m1,p] = sum(SL[m1,m0,p])
    LV[f,m1,p] = sum(SL[m1,m0,p] * V[f,m1,m0])
    RD[m1,p] = RD[m1-1,p] * PM[m1,p] + LD[m1,p]
    RV[f,m1,p] = RV[f,m1-1,p] * PM[m1,p] + LV[f,m1,p]
    AV[f,p] = RV[f,m1:end,p] / RD[m1:end,p]
    """,
)
