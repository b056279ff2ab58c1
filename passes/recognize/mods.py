"""Read the two functions of a FlexAttention call: what its `mask_mod` keeps, and how its `score_mod` changes a score.

Both are graphs of their own over scalars: (b, h, q, k), after them what they captured. A scalar is an axis of the expression, a
captured tensor or size is a value of the graph that calls. A `score_mod` is understood as scale, then softcap, then what is added
or filled in; a step in another order, or a score used in any other way, is a refusal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from effcompile.core.expr import BATCH, BOOL, FLOAT, HEAD, KEY, QUERY, Expr, apply, axis, const
from effcompile.core.site import Refusal
from effcompile.passes.recognize.elements import Index, Reader, Unreadable, op_name
from effcompile.passes.recognize.index_rules import never_negative

_DROPPED = -1e9  # exp(x - max) is 0 in float32 for a score at or below it, whatever attention's scores are
_ABSORBS = -1e30  # number + bias == number in float32 at or below it, whatever the bias
_SAME = ("to", "_to_copy", "clone", "alias", "contiguous", "lift_fresh_copy")
_SCALARS = tuple(map(axis, (BATCH, HEAD, QUERY, KEY)))


class NotAttention(Exception):
    """Say why a score function is no step of attention that this project knows."""

    def __init__(self, code: str, reason: str, hint: str = "") -> None:
        self.refusal = Refusal(code, reason, hint)


@dataclass
class ModReader(Reader):
    """Walk the graph of one function; `bound` says what each placeholder is to the graph that `outer` walks.

    A placeholder is bound to an axis, to a node of the outer graph, or to None where its value cannot be expressed: the score.
    """

    outer: Reader | None = None
    bound: Mapping[fx.Node, Expr | fx.Node | None] = field(default_factory=dict)
    at: int = 0  # the position of the call in the outer graph

    def _symbolic(self, expr: Any, environment: Any) -> Expr:
        assert self.outer is not None
        return self.outer._symbolic(expr, environment)

    def leaf(self, node: fx.Node, index: Index, at: int) -> Expr:
        """Return an axis, or an element of a captured value as the calling graph sees it."""
        assert self.outer is not None
        value = self.bound.get(node)
        if isinstance(value, Expr):
            return value
        if isinstance(value, fx.Node):
            with self.outer.unsure() if self._unsure else _sure():
                if all(map(never_negative, index)):
                    return self.outer.element(value, index, self.at)
                # torch counts a negative place from the end, and so does a load
                return self.outer.leaf(value, index, self.at)
        number = self._written_number(node)
        if number is None:
            what = "the score itself" if node in self.bound else f"`{op_name(node) or node.name}`"
            raise Unreadable(f"the function reads {what}")
        return number


class _sure:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _reader(module: fx.GraphModule, scores: int, captured: Sequence[Any], outer: Reader, at: int) -> ModReader:
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    bound: dict[fx.Node, Expr | fx.Node | None] = dict.fromkeys(places[:scores])
    bound |= dict(zip(places[scores:], (*_SCALARS, *captured)))
    return ModReader(module.graph, outer.rules, outer=outer, bound=bound, at=at)


def result_of(module: fx.GraphModule) -> Any:
    """Return what a function graph returns."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    value = output.args[0]
    return value[0] if isinstance(value, list | tuple) else value


def read_mask_mod(module: fx.GraphModule, captured: Sequence[Any], outer: Reader, at: int) -> Expr:
    """Return the predicate; slots are those of `outer`. Raise `Unreadable` where an operation is not known."""
    found = _reader(module, 0, captured, outer, at)
    return apply("to", found.element(result_of(module), (), len(found.order)), dtype=BOOL)


@dataclass(frozen=True)
class ScoreMod:
    """Hold softcap(scale * score) + addend; fills of masked scores are leaves of the addend.

    `added` tells whether anything was added; `fill` is the one finite number that masked scores become.
    """

    scale: float = 1.0
    softcap: float = 0.0
    addend: Expr | None = None
    added: bool = False
    fill: float | None = None


def read_score_mod(module: fx.GraphModule, captured: Sequence[Any], outer: Reader, at: int) -> ScoreMod:
    """Return what the function does to a score; raise `NotAttention` or `Unreadable`."""
    walk = _Walk(_reader(module, 1, captured, outer, at))
    return walk.read(result_of(module))


class _Walk:
    def __init__(self, reader: ModReader) -> None:
        self.reader = reader
        self.score = next(iter(reader.order))
        self.scored: set[fx.Node] = {self.score}
        for node in reader.order:
            if any(arg in self.scored for arg in node.all_input_nodes):
                self.scored.add(node)

    def read(self, node: Any) -> ScoreMod:
        if node is self.score:
            return ScoreMod()
        if node not in self.scored:
            raise NotAttention("EFF-A106", "the score function ignores the score")
        name, args = op_name(node), node.args
        if name in _SAME:
            old, new = args[0].meta["val"].dtype, node.meta["val"].dtype
            if not new.is_floating_point or torch.promote_types(old, new) != new:
                raise NotAttention("EFF-A106", f"the score function rounds the score to {new}")
            return self.read(args[0])
        if name in ("mul", "div"):
            return self._scaled(node, name)
        if name == "tanh":
            inner = self.read(args[0])
            if inner.addend is not None or inner.softcap or inner.scale <= 0:
                raise NotAttention("EFF-A104", "the score function caps the scores after a mask or a bias")
            return ScoreMod(inner.scale, 1.0)
        if name in ("add", "sub"):
            return self._added(node, name)
        if name == "where":
            return self._chosen(args[0], args[1], args[2])
        if name == "masked_fill":
            return self._chosen(args[1], args[2], args[0])
        raise NotAttention("EFF-A106", f"`{name or node.name}` of the score in the score function")

    def _element(self, value: Any) -> Expr:
        return self.reader.element(value, (), len(self.reader.order))

    def _scaled(self, node: fx.Node, name: str) -> ScoreMod:
        path, by = node.args[0], node.args[1]
        if name == "mul" and path not in self.scored:
            path, by = by, path
        if path not in self.scored or by in self.scored or node.kwargs.get("rounding_mode") is not None:
            raise NotAttention("EFF-A106", f"`{name}` of the score in the score function")
        factor = self._element(by)
        if not factor.is_const or not factor.value:
            raise NotAttention("EFF-A106", "the score function scales the scores by a tensor")
        inner, number = self.read(path), float(factor.value)
        number = number if name == "mul" else 1.0 / number
        if inner.addend is not None:
            raise NotAttention("EFF-A104", "the score function scales the scores after a mask or a bias")
        if inner.softcap and number <= 0:
            raise NotAttention("EFF-A106", "the score function turns capped scores around")
        # c tanh(x / c), times m: (c m) tanh(x m / (c m)).
        return ScoreMod(inner.scale * number, inner.softcap * number)

    def _added(self, node: fx.Node, name: str) -> ScoreMod:
        path, other = node.args[0], node.args[1]
        if name == "add" and path not in self.scored:
            path, other = other, path
        if path not in self.scored or other in self.scored or node.kwargs.get("alpha", 1) != 1:
            raise NotAttention("EFF-A106", f"`{name}` of the score in the score function")
        item = self._element(other)
        if not item.dtype.is_floating_point:
            item = apply("to", item, dtype=FLOAT)
        inner = self.read(path)
        if inner.fill is not None and inner.fill > _ABSORBS:  # a row of such numbers would show what is added to them
            raise NotAttention("EFF-A104", f"the score function adds to scores that became {inner.fill:g}")
        before = const(0.0, item.dtype) if inner.addend is None else inner.addend
        return replace(inner, addend=apply(name, before, item), added=True)

    def _chosen(self, cond: Any, yes: Any, no: Any) -> ScoreMod:
        """Read a choice between two scores of one scale, or between a score and what no score falls to."""
        if cond in self.scored:
            raise NotAttention("EFF-A106", "the score function decides by the score")
        kept = apply("to", self._element(cond), dtype=BOOL)
        sides = [self.read(side) if side in self.scored else None for side in (yes, no)]
        known = [side for side in sides if side is not None]
        if any((side.scale, side.softcap) != (known[0].scale, known[0].softcap) for side in known):
            raise NotAttention("EFF-A106", "the score function chooses between scores of different scale")
        numbers = [None if side is not None else self._fill(given) for side, given in zip(sides, (yes, no))]
        leaves = [
            _leaf(number) if side is None else const(0.0) if side.addend is None else side.addend
            for side, number in zip(sides, numbers)
        ]
        fills = {number for number in (*numbers, *(side.fill for side in known)) if number not in (None, -math.inf)}
        if len(fills) > 1:  # where nothing else is left in a row, the larger one takes it all
            raise NotAttention("EFF-A106", "the score function gives masked scores different numbers")
        added = any(side.added for side in known)
        return replace(known[0], addend=apply("where", kept, *leaves), added=added, fill=next(iter(fills), None))

    def _fill(self, value: Any) -> float:
        fill = self._element(value)
        number = float(fill.value) if fill.is_const and fill.value is not None else math.nan
        if not number <= _DROPPED:
            raise NotAttention("EFF-A106", f"masked scores become {number:g}, which others may not outweigh")
        return number


def _leaf(number: float | None) -> Expr:
    """Return what is added instead of replacing the score: at the least number no score shows any more."""
    return const(-math.inf if number == -math.inf else torch.finfo(FLOAT).min)
