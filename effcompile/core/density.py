"""Count what a predicate keeps, without the tensor and without data: whole blocks for kernels, pairs for density.

What reads a tensor is taken to keep everything: padding that is not there. Symbolic sizes are counted at `NOMINAL`.
"""

from __future__ import annotations

import functools

import torch

from effcompile.core.expr import FALSE, KEY, QUERY, TRUE, Expr, apply, axes_of, walk
from effcompile.core.expr_eval import evaluate
from effcompile.core.intervals import block_bounds

NOMINAL = 1024
_ROWS = 128  # sampled query rows for a count of pairs


def extent(value: int | str) -> int:
    """Return a size, or the nominal one for a symbolic size."""
    return value if isinstance(value, int) else NOMINAL


def without_data(expr: Expr) -> Expr:
    """Take every condition that reads a tensor or a symbolic size to hold, and its negation not to hold."""
    if expr.op in ("and", "or"):
        return apply(expr.op, *(without_data(part) for part in expr.args))
    if expr.op == "not" and _reads(expr.args[0]):
        return FALSE
    return TRUE if _reads(expr) or not axes_of(expr) & {QUERY, KEY} else expr


def _reads(expr: Expr) -> bool:
    return any(node.op in ("load", "size") for node in walk(expr))


@functools.lru_cache(maxsize=256)
def visited(keep: Expr, rows: int, columns: int, block: tuple[int, int]) -> float:
    """Return the share of blocks (queries, keys) in which the predicate may keep a pair."""
    static = without_data(keep)
    if static in (TRUE, FALSE):
        return 1.0
    _, some = block_bounds(static, (1, 1, rows, columns), block, [], [], torch.device("cpu"))
    return float(some.float().mean())


@functools.lru_cache(maxsize=256)
def pairs(keep: Expr, rows: int, columns: int) -> float:
    """Return the share of pairs that the predicate keeps, counted on at most 128 rows at even distances."""
    static = without_data(keep)
    if static in (TRUE, FALSE):
        return float(static == TRUE)
    count = min(rows, _ROWS)
    places = (torch.arange(count, dtype=torch.float64) + 0.5) * rows / count
    zero = torch.zeros((1, 1, 1, 1), dtype=torch.int64)
    axes = (zero, zero, places.floor().long().reshape(1, 1, -1, 1), torch.arange(columns).reshape(1, 1, 1, -1))
    return float(evaluate(static, axes, [], []).expand(1, 1, count, columns).double().mean())
