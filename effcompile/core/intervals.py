"""Bound a predicate on blocks of query and key indices, without the tensor.

A sub-expression that depends on queries only, or keys only, is evaluated exactly at every position and reduced per block: that
is O(Q + K) values. What mixes both is bounded by interval arithmetic. The answer is conservative: `every` only where each pair
is kept, `some` wherever one might be, so that a kernel that checks partial blocks element by element stays exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from effcompile.core.expr import BOOL, KEY, QUERY, Expr, axes_of
from effcompile.core.expr_eval import evaluate

Bounds = tuple[torch.Tensor, torch.Tensor]


def block_bounds(
    expr: Expr,
    extents: tuple[int, int, int, int],
    blocks: tuple[int, int],
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    device: torch.device,
) -> Bounds:
    """Return (every, some): bool `[B|1, H|1, ceil(Q/bq), ceil(K/bk)]`, for extents (B, H, Q, K) and blocks (bq, bk)."""
    axes = [
        torch.arange(n, device=device).reshape([n if d == place else 1 for d in range(4)])
        for place, n in enumerate(extents)
    ]
    memo: dict[Expr, Bounds] = {}
    zero = torch.zeros((1, 1, 1, 1), dtype=torch.float64, device=device)

    def run(node: Expr) -> Bounds:
        if node not in memo:
            depends = axes_of(node) & {QUERY, KEY}
            memo[node] = exact(node, depends) if len(depends) < 2 else mixed(node)
        return memo[node]

    def exact(node: Expr, depends: frozenset[int]) -> Bounds:
        value = evaluate(node, axes, loads, sizes)
        value = value.reshape([1] * (4 - value.dim()) + list(value.shape)) if value.dim() < 4 else value
        low, high = (value, value) if not depends else _reduced(value, next(iter(depends)), blocks)
        # Bounds of integers are float64: exact for every index, infinite where nothing is known, never wrapping around.
        return (low, high) if value.dtype == BOOL else (low.double(), high.double())

    def mixed(node: Expr) -> Bounds:
        if any(arg.dtype.is_floating_point for arg in node.args):
            return unknown(node)  # NaN has no bounds
        if node.op in _RULES:
            return _RULES[node.op]([run(arg) for arg in node.args])
        if node.op == "floordiv" and node.args[1].is_const and int(node.args[1].value or 0) > 0:
            low, high = run(node.args[0])
            by = int(node.args[1].value or 1)
            return torch.floor(low / by), torch.floor(high / by)
        if node.op == "mod" and node.args[1].is_const and int(node.args[1].value or 0) > 0:
            by = int(node.args[1].value or 1)
            return zero, zero + (by - 1)
        return unknown(node)

    def unknown(node: Expr) -> Bounds:
        if node.dtype == BOOL:
            return zero > 0, zero == 0
        return zero - math.inf, zero + math.inf

    every, some = run(expr)
    shape = [max(every.shape[0], some.shape[0]), max(every.shape[1], some.shape[1])]
    shape += [-(-extents[2] // blocks[0]), -(-extents[3] // blocks[1])]
    return every.expand(shape), some.expand(shape)


def _reduced(value: torch.Tensor, dim: int, blocks: tuple[int, int]) -> Bounds:
    return reduce_blocks(value, dim, blocks[dim - QUERY])


def reduce_blocks(value: torch.Tensor, dim: int, block: int) -> Bounds:
    """Return the least and largest value in each block along `dim`; the last block may be short."""
    extent = value.shape[dim]
    count = -(-extent // block)
    missing = count * block - extent
    if missing:
        tail = value.select(dim, extent - 1).unsqueeze(dim)
        value = torch.cat([value, tail.expand([missing if d == dim else n for d, n in enumerate(value.shape)])], dim)
    value = value.unflatten(dim, (count, block))
    if value.dtype == BOOL:
        return value.all(dim + 1), value.any(dim + 1)
    return value.amin(dim + 1), value.amax(dim + 1)


def _add(args: list[Bounds]) -> Bounds:
    low, high = args[0]
    for a, b in args[1:]:
        low, high = low + a, high + b
    return low, high


def _mul(args: list[Bounds]) -> Bounds:
    (a, b), (c, d) = args
    products = torch.broadcast_tensors(
        *(torch.nan_to_num(x, 0.0, math.inf, -math.inf) for x in (a * c, a * d, b * c, b * d))
    )
    stacked = torch.stack(products)
    return stacked.amin(0), stacked.amax(0)


def _le(args: list[Bounds]) -> Bounds:
    (a, b), (c, d) = args
    return b <= c, a <= d


def _eq(args: list[Bounds]) -> Bounds:
    (a, b), (c, d) = args
    return (a == b) & (c == d) & (a == c), (a <= d) & (c <= b)


def _and(args: list[Bounds]) -> Bounds:
    every, some = args[0]
    for a, b in args[1:]:
        every, some = every & a, some & b
    return every, some


def _or(args: list[Bounds]) -> Bounds:
    every, some = args[0]
    for a, b in args[1:]:
        every, some = every | a, some | b
    return every, some


def _not(args: list[Bounds]) -> Bounds:
    every, some = args[0]
    return ~some, ~every


def _where(args: list[Bounds]) -> Bounds:
    (every, some), (a, b), (c, d) = args
    if a.dtype == BOOL:
        return (every & a) | (~some & c) | (a & c), (some & b) | (~every & d)
    low = torch.where(every, a, torch.where(some, torch.minimum(a, c), c))
    high = torch.where(every, b, torch.where(some, torch.maximum(b, d), d))
    return low, high


def _abs(args: list[Bounds]) -> Bounds:
    low, high = args[0]
    inside = (low <= 0) & (high >= 0)
    least = torch.where(inside, torch.zeros_like(low), torch.minimum(low.abs(), high.abs()))
    return least, torch.maximum(low.abs(), high.abs())


_RULES: dict[str, Callable[[list[Bounds]], Bounds]] = {
    "add": _add,
    "mul": _mul,
    "le": _le,
    "eq": _eq,
    "ne": lambda args: _not([_eq(args)]),
    "and": _and,
    "or": _or,
    "not": _not,
    "where": _where,
    "abs": _abs,
    "neg": lambda args: (-args[0][1], -args[0][0]),
    "minimum": lambda args: (torch.minimum(args[0][0], args[1][0]), torch.minimum(args[0][1], args[1][1])),
    "maximum": lambda args: (torch.maximum(args[0][0], args[1][0]), torch.maximum(args[0][1], args[1][1])),
}
