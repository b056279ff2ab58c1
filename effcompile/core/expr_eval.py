"""Evaluate an expression on index tensors, bound it on blocks, and store it as text.

Three readings of one `Expr`: its value on broadcast index tensors (also under tracing, which yields a FlexAttention
`mask_mod`), an interval per block (which yields a block map without any S x S tensor), and JSON (an op's argument).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from effcompile.core.expr import BOOL, INT, Expr

TORCH: dict[str, Callable[..., Any]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "neg": torch.neg,
    "signed": lambda value: value,  # marks a symbolic integer that may be negative
    "abs": torch.abs,
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "truncdiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "truediv": torch.true_divide,
    "mod": torch.remainder,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "pow": torch.pow,
    "log": torch.log,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "le": torch.le,
    "lt": torch.lt,
    "ge": torch.ge,
    "gt": torch.gt,
    "eq": torch.eq,
    "ne": torch.ne,
    "not": torch.logical_not,
    "xor": torch.logical_xor,
    "where": torch.where,
}


def apply_torch(op: str, args: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Run one operation; operands are broadcast tensors, the result has `dtype`."""
    if op == "to":
        return args[0].to(dtype)
    if op in ("and", "or"):
        result = args[0]
        for arg in args[1:]:
            result = torch.logical_and(result, arg) if op == "and" else torch.logical_or(result, arg)
        return result
    if op in ("add", "minimum", "maximum") and len(args) > 2:
        result = args[0]
        for arg in args[1:]:
            result = TORCH[op](result, arg)
        return result
    if op == "where":
        return torch.where(args[0], args[1].to(dtype), args[2].to(dtype))
    if op in ("minimum", "maximum"):
        return TORCH[op](args[0].to(dtype), args[1].to(dtype))
    result = TORCH[op](*args)
    return result if result.dtype == dtype else result.to(dtype)


def evaluate(
    expr: Expr, axes: Sequence[torch.Tensor], loads: Sequence[torch.Tensor], sizes: Sequence[int]
) -> torch.Tensor:
    """Return the values on index tensors.

    `axes` are four int64 tensors (b, h, q, k) that broadcast against each other, e.g. `[B,1,1,1] [1,H,1,1] [1,1,Q,1]
    [1,1,1,K]`; the result has their broadcast shape as far as the expression depends on them.
    """
    device = axes[0].device
    memo: dict[Expr, torch.Tensor] = {}

    def run(node: Expr) -> torch.Tensor:
        if node not in memo:
            memo[node] = leaf(node) if not node.args else inner(node)
        return memo[node]

    def leaf(node: Expr) -> torch.Tensor:
        if node.op == "axis":
            return axes[int(node.value or 0)]
        if node.op == "size":
            return torch.full((), sizes[int(node.value or 0)], dtype=INT, device=device)
        if node.op == "load":
            value = loads[int(node.value or 0)]  # a tensor without dimensions
            return value.to(INT) if node.dtype == INT else value
        assert node.value is not None
        return torch.full((), node.value, dtype=node.dtype, device=device)

    def inner(node: Expr) -> torch.Tensor:
        args = [run(arg) for arg in node.args]
        if node.op == "load":
            # Python indexing would read 0-dimensional indices on the host; FlexAttention traces with exactly those.
            value = torch.ops.aten.index.Tensor(loads[int(node.value or 0)], args)
            return value.to(INT) if node.dtype == INT else value
        return apply_torch(node.op, args, node.dtype)

    return run(expr)


def to_json(expr: Expr) -> str:
    """Return the expression as one line of JSON, the form that ops and plans carry."""

    def pack(node: Expr) -> Any:
        name = str(node.dtype).removeprefix("torch.")
        value = node.value if not isinstance(node.value, float) else repr(node.value)
        return [node.op, name, value, *(pack(arg) for arg in node.args)]

    return json.dumps(pack(expr), separators=(",", ":"))


def from_json(text: str) -> Expr:
    """Read what `to_json` wrote."""

    def unpack(item: list[Any]) -> Expr:
        op, name, value, *args = item
        dtype = getattr(torch, name)
        if isinstance(value, str):
            value = float(value)
        if dtype == BOOL and value is not None and op == "const":
            value = bool(value)
        return Expr(op, tuple(unpack(arg) for arg in args), value, dtype)

    return unpack(json.loads(text))
