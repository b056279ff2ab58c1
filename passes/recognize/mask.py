"""Recover the predicate behind an attention mask from the subgraph that builds it.

The result is proved or it is `Opaque`: no example value is ever read. A float mask is split into cases; a case that adds 0
keeps the key, one that adds a value no score can overcome drops it, anything else is a score addend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from effcompile.core.expr import BATCH, BOOL, FALSE, HEAD, KEY, QUERY, TRUE, Expr, apply, axes_of, axis, const, invert
from effcompile.core.mask import AnyMask, EmptyRow, Mask, Opaque, diagonal_kept, settle
from effcompile.passes.recognize.element_rules import rules
from effcompile.passes.recognize.elements import Reader, Unreadable

# A finite fill at or below this cannot be told from -inf in float32 once a kept key is in the row: exp(fill - score) == 0
# for every score that attention produces. Swin's -100 is above it and stays an addend.
_FILL_LIMIT = -1e9
_LARGEST = 48  # sub-expressions; beyond it a predicate costs more than the tensor


@dataclass(frozen=True)
class ReadMask:
    """Hold a recovered mask with the graph values its slots refer to."""

    mask: AnyMask
    loads: tuple[fx.Node, ...] = ()
    sizes: tuple[Any, ...] = ()
    pinned: tuple[fx.Node, ...] = ()


@dataclass
class MaskReader:
    """Read masks of one graph; equal mask nodes are read once."""

    graph: fx.Graph
    buffers: Callable[[fx.Node], torch.Tensor | None] = lambda node: None
    _memo: dict[tuple[fx.Node, str, str, str], ReadMask] = field(default_factory=dict)
    _reader: Reader | None = None

    def read(self, node: fx.Node, at: fx.Node, q_len: Any, k_len: Any, empty_row: EmptyRow) -> ReadMask:
        """Return the mask that `node` (`[..., Q, K]`, bool keeps, float adds) is for the attention at `at`."""
        key = (node, str(q_len), str(k_len), empty_row)
        if key not in self._memo:
            self._memo[key] = self._read(node, at, q_len, k_len, empty_row)
        return self._memo[key]

    def _read(self, node: fx.Node, at: fx.Node, q_len: Any, k_len: Any, empty_row: EmptyRow) -> ReadMask:
        if self._reader is None:
            self._reader = Reader(self.graph, rules(), self.buffers)
        reader = Reader(self.graph, self._reader.rules, self.buffers)
        value = node.meta["val"]
        name = str(value.dtype).removeprefix("torch.")
        try:
            if value.dim() > 4:
                raise Unreadable(f"a mask of rank {value.dim()}")
            axes = tuple(axis(number) for number in (BATCH, HEAD, QUERY, KEY))[4 - value.dim() :]
            expr = reader.element(node, axes, reader.order[at])
            mask = split(expr, reader.number(q_len), reader.number(k_len), empty_row, value.dtype)
        except Unreadable as refusal:
            return ReadMask(Opaque(str(refusal), name))
        return ReadMask(mask, tuple(reader.loads), tuple(reader.sizes), tuple(reader.pinned))


def split(expr: Expr, q_len: Expr, k_len: Expr, empty_row: EmptyRow, dtype: torch.dtype) -> Mask:
    """Split a mask element into predicate, addend, fill and empty-row rule; raise `Unreadable` where that is unproved."""
    if count(expr) > _LARGEST:
        raise Unreadable(f"the predicate has {count(expr)} operations")
    if expr.dtype == BOOL:
        return _finish(expr, None, "bool", empty_row, TRUE, q_len, k_len)
    if not expr.dtype.is_floating_point:
        raise Unreadable(f"a mask of dtype {expr.dtype}")
    keep, soft, bias, fills = FALSE, FALSE, None, []
    for cond, leaf in cases(expr):
        if leaf.is_const and leaf.value == 0:
            keep = apply("or", keep, cond)
        elif leaf.is_const and float(leaf.value or 0) == -math.inf:
            fills.append("-inf")
        elif leaf.is_const and float(leaf.value or 0) <= max(_FILL_LIMIT, _least(dtype)):
            soft = apply("or", soft, cond)
            fills.append("min" if leaf.value == _least(dtype) else repr(leaf.value))
        elif bias is None or bias == leaf:
            bias = leaf
            keep = apply("or", keep, cond)
        else:
            raise Unreadable("a float mask with several addends")
    if bias is not None and keep != TRUE and any(leaf.is_const and leaf.value == 0 for _, leaf in cases(expr)):
        raise Unreadable("a float mask that adds a score to some kept keys only")
    rule: EmptyRow = "uniform" if soft != FALSE else empty_row
    return _finish(keep, bias, "+".join(sorted(set(fills))) or "none", rule, _softened(soft, keep), q_len, k_len)


def _softened(soft: Expr, keep: Expr) -> Expr:
    """Return the keys an empty row averages over; where nothing is kept, `not keep` is no condition."""
    return TRUE if soft in (invert(keep), FALSE) else soft


def _finish(
    keep: Expr, bias: Expr | None, fill: str, empty_row: EmptyRow, soft: Expr, q_len: Expr, k_len: Expr
) -> Mask:
    keep = settle(keep, q_len, k_len)
    if keep == FALSE:
        raise Unreadable("the mask keeps no key at all")
    if keep == TRUE or diagonal_kept(keep, q_len, k_len):
        return Mask(keep, bias, fill, "never")
    return Mask(keep, bias, fill, empty_row, soft)


def _least(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).min)


def cases(expr: Expr) -> list[tuple[Expr, Expr]]:
    """Split `where` trees (also under an addition) into exclusive (condition, leaf) pairs."""
    if expr.op == "where":
        cond, yes, no = expr.args
        found = [(apply("and", cond, c), leaf) for c, leaf in cases(yes)]
        found += [(apply("and", invert(cond), c), leaf) for c, leaf in cases(no)]
        return [(c, leaf) for c, leaf in found if c != FALSE]
    if expr.op == "add" and len(expr.args) == 2 and expr.dtype.is_floating_point:
        found = [
            (both, apply("add", x, y, dtype=expr.dtype))
            for c, x in cases(expr.args[0])
            for d, y in cases(expr.args[1])
            if (both := apply("and", c, d)) != FALSE
        ]
        return [(c, _dominated(leaf)) for c, leaf in found] if len(found) <= 8 else [(TRUE, expr)]
    return [(TRUE, expr)]


def _dominated(leaf: Expr) -> Expr:
    """Turn `fill + finite` into the fill: at that size the addition rounds to it or stays below every score."""
    if leaf.op == "add":
        for arg, other in (leaf.args, leaf.args[::-1]):
            if arg.is_const and float(arg.value or 0) <= _least(leaf.dtype) and not other.is_const:
                return arg
    return leaf


def count(expr: Expr) -> int:
    """Return the number of distinct operations."""
    from effcompile.core.expr import walk

    return sum(1 for _ in walk(expr))


def reads_rows(expr: Expr) -> bool:
    """Tell whether the expression depends on the query index."""
    return QUERY in axes_of(expr) or const(0) == expr
