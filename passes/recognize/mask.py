"""Recover the predicate behind an attention mask from the subgraph that builds it.

The result is proved or it is `Opaque`: no example value is ever read. A float mask is split into cases; a case that adds 0
keeps the key, one that adds a value no score can overcome drops it, anything else is a score addend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from effcompile.core.expr import BOOL, FALSE, KEY, QUERY, TRUE, Expr, apply, axes_of, axis, const, invert, linear
from effcompile.core.mask import AnyMask, EmptyRow, Mask, diagonal_kept, settle
from effcompile.passes.recognize.elements import Unreadable

# A finite fill at or below this cannot be told from -inf in float32 once a kept key is in the row: exp(fill - score) == 0
# for every score that attention produces. Swin's -100 is above it and stays an addend.
_FILL_LIMIT = -1e9
_ABSORBS = -1e30  # score + fill == fill in float32 at or below it, whatever the score
_LARGEST = 48  # sub-expressions; beyond it a predicate costs more than the tensor


@dataclass(frozen=True)
class ReadMask:
    """Hold a recovered mask with the graph values its slots refer to; `element` where no tensor of the graph holds it.

    `snapshots` are the loads that mean what the node held where it came to be, before any write to it.
    """

    mask: AnyMask
    loads: tuple[fx.Node, ...] = ()
    sizes: tuple[Any, ...] = ()
    pinned: tuple[fx.Node, ...] = ()
    element: Expr | None = None
    snapshots: tuple[fx.Node, ...] = ()


def split(expr: Expr, q_len: Expr, k_len: Expr, empty_row: EmptyRow, dtype: torch.dtype, added: bool = True) -> Mask:
    """Split a mask element into predicate, addend, fill and empty-row rule; raise `Unreadable` where that is unproved.

    `dtype` is that of the scores; `added` tells whether a finite fill was added to them (else it replaced them).
    """
    if count(expr) > _LARGEST:
        raise Unreadable(f"the predicate has {count(expr)} operations")
    if expr.dtype == BOOL:
        return _finish(expr, None, "bool", empty_row, TRUE, q_len, k_len)
    if not expr.dtype.is_floating_point:
        raise Unreadable(f"a mask of dtype {expr.dtype}")
    keep, soft, fills, addends, least = FALSE, FALSE, list[str](), list[Expr](), -math.inf
    for cond, leaf in cases(expr):
        if leaf.is_const and leaf.value == 0:
            keep = apply("or", keep, cond)
            addends.append(leaf)
        elif leaf.is_const and float(leaf.value or 0) == -math.inf:
            fills.append("-inf")
        elif leaf.is_const and float(leaf.value or 0) <= max(_FILL_LIMIT, _least(dtype)):
            soft = apply("or", soft, cond)
            least = max(least, float(leaf.value or 0))
            fills.append("min" if leaf.value == _least(dtype) else repr(leaf.value))
        else:
            keep = apply("or", keep, cond)
            addends.append(leaf)
    # Where kept keys get different addends, the whole element is the addend: what it adds to dropped keys does not matter.
    bias = None if all(leaf.is_const and leaf.value == 0 for leaf in addends) else expr
    if bias is not None and all(leaf == addends[0] for leaf in addends):
        bias = addends[0]
    rule: EmptyRow = "uniform" if soft != FALSE else empty_row
    fill = "+".join(sorted(set(fills))) or "none"
    mask = _finish(keep, bias, fill, rule, _softened(soft, keep), q_len, k_len)
    if mask.empty_row == "uniform" and added and least > _ABSORBS:
        raise Unreadable(f"{least:g} is added to whole rows, where scores still show through it")
    if mask.empty_row == "uniform" and mask.soft != TRUE and empty_row == "nan":
        raise Unreadable("rows without keys may be NaN or a mean over some keys")
    return mask


def _softened(soft: Expr, keep: Expr) -> Expr:
    """Return the keys an empty row averages over; where nothing is kept, `not keep` is no condition."""
    return TRUE if soft in (invert(keep), FALSE) else soft


def _finish(
    keep: Expr, bias: Expr | None, fill: str, empty_row: EmptyRow, soft: Expr, q_len: Expr, k_len: Expr
) -> Mask:
    keep = settle(ordered(keep) if q_len == const(1) else keep, q_len, k_len)
    if keep == FALSE:
        raise Unreadable("the mask keeps no key at all")
    if keep == TRUE or diagonal_kept(keep, q_len, k_len):
        return Mask(keep, bias, fill, "never")
    return Mask(keep, bias, fill, empty_row, soft)


def ordered(keep: Expr) -> Expr:
    """Write limits of the keys of a single query as causal order and windows are written: k <= e is k <= q + e where q is 0.

    A tensor of one row says nothing of q. With it the mask has its usual name, and kernels find the range of keys that they read.
    """
    if keep.op == "and":
        return apply("and", *map(ordered, keep.args))
    if keep.op != "le" or QUERY in axes_of(keep):
        return keep
    slack = apply("sub", keep.args[1], keep.args[0])
    factor = linear(slack)[0].get(axis(KEY), 0)
    if abs(factor) != 1 or any(KEY in axes_of(atom) for atom in linear(slack)[0] if atom != axis(KEY)):
        return keep
    return apply("le", const(0), apply("sub", slack, apply("mul", axis(QUERY), const(factor))))


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
