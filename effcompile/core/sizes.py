"""Describe the symbolic sizes of a graph: what values they may have, and where their value is found in a call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx


@dataclass(frozen=True)
class Size:
    """Describe a symbolic size: the value it had when the graph was traced, and its bounds (both included).

    `high` None means unbounded. `source` says which input has it (`x.size()[1]`).
    """

    name: str
    hint: int
    low: int = 0
    high: int | None = None
    source: str = ""


@dataclass(frozen=True)
class SizePlace:
    """Say where a call's arguments hold a size: argument `argument`, its dimension `dim`, or itself where that is None."""

    argument: int
    dim: int | None = None

    def read(self, args: Sequence[Any]) -> int:
        """Return the size in this call."""
        value = args[self.argument]
        return int(value if self.dim is None else value.shape[self.dim])


def symbolic_sizes(graph: fx.Graph) -> dict[str, Size]:
    """Return the sizes of a graph's inputs that are symbols with a known value, by name."""
    found: dict[str, Size] = {}
    for _, value in _symbols(graph):
        name = str(value.node.expr)
        hint = value.node.hint
        if name not in found and isinstance(hint, int):
            found[name] = _described(name, int(hint), value.node.shape_env, value.node.expr)
    return found


def place_of_size(graph: fx.Graph, name: str) -> SizePlace | None:
    """Return where the inputs of a graph hold a size: preferably an argument that is the size itself."""
    places = [place for place, value in _symbols(graph) if str(value.node.expr) == name]
    return min(places, key=lambda place: (place.dim is not None, place.argument), default=None)


def _symbols(graph: fx.Graph) -> Iterator[tuple[SizePlace, torch.SymInt]]:
    for number, node in enumerate(node for node in graph.nodes if node.op == "placeholder"):
        value = node.meta.get("val")
        sizes = enumerate(value.shape) if isinstance(value, torch.Tensor) else [(None, value)]
        for dim, size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                yield SizePlace(number, dim), size


def _described(name: str, hint: int, env: Any, symbol: Any) -> Size:
    span = env.var_to_range.get(symbol)
    low, high = (span.lower, span.upper) if span is not None else (0, None)
    sources = env.var_to_sources.get(symbol) or ()
    source = next((s.name if isinstance(s.name, str) else s.name() for s in sources), "")
    return Size(name, hint, _whole(low) or 0, _whole(high), source)


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, int | sympy.Integer) else None


def evaluate(text: str, values: Mapping[str, int]) -> int | None:
    """Return the value of a size that is a number or one of the named symbols; None for any other expression."""
    if text in values:
        return values[text]
    return int(text) if text.isdigit() else None
