"""Split a predicate into what a kernel checks per row, per key, and per pair.

Most masks are a range of keys for each query (causal order, windows, offsets, caches) and a set of keys (padding). Those cost
a kernel two integers a row and one byte a key. Only what is neither becomes tiles of single pairs, for the blocks that need them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from effcompile.core.expr import BATCH, HEAD, KEY, QUERY, TRUE, Expr, apply, axes_of, axis, const, linear
from effcompile.core.expr_eval import evaluate, from_json
from effcompile.core.mask import from_terms

_LEAST, _MOST = -(2**30), 2**30


@dataclass(frozen=True)
class RowLimits:
    """Hold the parts of a predicate: `first(b, q) <= k <= last(b, q)`, `keys(b, k)`, `rows(b, q)`, and the rest."""

    first: tuple[Expr, ...]
    last: tuple[Expr, ...]
    keys: Expr
    rows: Expr
    rest: Expr


@functools.lru_cache(maxsize=256)
def split_limits(keep: str) -> RowLimits:
    """Return the parts of a predicate in JSON."""
    predicate = from_json(keep)
    parts = predicate.args if predicate.op == "and" else (predicate,)
    first: list[Expr] = []
    last: list[Expr] = []
    keys, rows, rest = TRUE, TRUE, TRUE
    for part in parts:
        used = axes_of(part)
        limit = _limit(part)
        if HEAD in used or (KEY in used and QUERY in used and limit is None):
            rest = apply("and", rest, part)
        elif KEY not in used:
            rows = apply("and", rows, part)
        elif limit is None or QUERY not in used:
            keys = apply("and", keys, part)
        else:
            (last if limit[1] else first).append(limit[0])
    return RowLimits(tuple(first), tuple(last), keys, rows, rest)


def _limit(part: Expr) -> tuple[Expr, bool] | None:
    """Return (E, True) where the condition is k <= E and (E, False) where it is k >= E; E does not depend on k."""
    if part.op != "le":
        return None
    terms, number = linear(apply("sub", part.args[1], part.args[0]))
    factor = terms.pop(axis(KEY), 0)
    if abs(factor) != 1 or any(KEY in axes_of(atom) for atom in terms):
        return None
    rest = from_terms(terms, number)
    return (rest, True) if factor == -1 else (apply("sub", const(0), rest), False)


@dataclass(frozen=True)
class Limits:
    """Hold the values: first and last `[B|1, Q]` int32, keys `[B|1, K]` uint8; None where nothing is cut."""

    first: torch.Tensor | None
    last: torch.Tensor | None
    keys: torch.Tensor | None


def values(
    parts: RowLimits, extents: tuple[int, int, int, int], loads: Sequence[torch.Tensor], sizes: Sequence[int]
) -> Limits:
    """Evaluate the parts that concern whole rows and keys, for extents (B, H, Q, K)."""
    batch, _, rows, columns = extents
    device = loads[0].device if loads else torch.device("cpu")
    axes = [
        torch.arange(n, device=device).reshape([n if d == place else 1 for d in range(4)])
        for place, n in ((BATCH, batch), (HEAD, 1), (QUERY, rows), (KEY, columns))
    ]

    def lines(expr: Expr, dim: int, count: int) -> torch.Tensor:
        value = evaluate(expr, axes, loads, sizes)
        value = value.expand([*([1] * (4 - value.dim())), *value.shape]).select(HEAD, 0).select(3 - dim + 1, 0)
        return value.expand(value.shape[0], count)

    first = _extreme([lines(expr, QUERY, rows) for expr in parts.first], largest=True)
    last = _extreme([lines(expr, QUERY, rows) for expr in parts.last], largest=False)
    if parts.rows != TRUE:
        alive = lines(parts.rows, QUERY, rows)
        last = torch.where(alive, _MOST if last is None else last, -1)
    keys = None if parts.keys == TRUE else lines(parts.keys, KEY, columns).to(torch.uint8).contiguous()
    return Limits(_int32(first), _int32(last), keys)


def _extreme(found: list[torch.Tensor], *, largest: bool) -> torch.Tensor | None:
    total: torch.Tensor | None = None
    for value in found:
        if total is None:
            total = value
        else:
            total = torch.maximum(total, value) if largest else torch.minimum(total, value)
    return total


def _int32(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.clamp(_LEAST, _MOST).to(torch.int32).contiguous()
