"""Read a product of two activations: matmul, bmm, baddbmm, or an einsum with one contracted index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from effcompile.core.rewrite import Editor
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.match import Operand, same_size


@dataclass(frozen=True)
class Product:
    """Hold left @ right * alpha + addend, seen both as scores (q, k) and as the product with the values (v)."""

    name: str
    node: fx.Node
    left: fx.Node
    right: fx.Node
    q: Operand
    k: Operand
    v: Operand
    k_node: fx.Node | None
    v_node: fx.Node | None
    alpha: float = 1.0
    addend: fx.Node | None = None
    plain_left: bool = True
    out_dims: tuple[int, ...] = (0, 1, 2, 3)  # the result is [batch, heads, rows, columns] permuted by these

    @property
    def four(self) -> bool:
        """Tell whether the product is over `[B, H, S, D]` operands."""
        return self.left.meta["val"].dim() == 4


def product_of(node: fx.Node) -> Product | None:
    """Return the product that `node` computes, or None. Both operands must be activations of rank 3 or 4."""
    name = op_name(node)
    if name in ("matmul", "bmm"):
        left, right = node.args[0], node.args[1]
        return _matmul(node, name, left, right)
    if name == "baddbmm":
        addend, left, right = node.args[:3]
        beta = node.kwargs.get("beta", node.args[3] if len(node.args) > 3 else 1)
        alpha = node.kwargs.get("alpha", node.args[4] if len(node.args) > 4 else 1)
        if not isinstance(beta, int | float) or not isinstance(alpha, int | float) or beta not in (0, 1):
            return None
        return _matmul(node, name, left, right, float(alpha), addend if beta else None)
    if name == "einsum":
        return _einsum(node)
    return None


def _rank(value: Any) -> int:
    return (
        value.meta["val"].dim() if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor) else 0
    )


def _matmul(node: fx.Node, name: str, left: Any, right: Any, alpha: float = 1.0, addend: Any = None) -> Product | None:
    if _rank(left) not in (3, 4) or _rank(right) != _rank(left):
        return None
    keys = _untransposed(right)

    def k(edit: Editor) -> fx.Node:
        return keys if keys is not None else edit.call(torch.ops.aten.transpose.int, right, -1, -2)

    return Product(name, node, left, right, lambda e: left, k, lambda e: right, keys, right, alpha, addend)


def _untransposed(node: fx.Node) -> fx.Node | None:
    """Return x where `node` is x transposed in its last two dimensions."""
    name, rank = op_name(node), _rank(node)
    source = node.args[0] if node.args else None
    if name == "transpose" and {int(d) % rank for d in node.args[1:3]} == {rank - 1, rank - 2}:  # type: ignore[arg-type]
        return source if isinstance(source, fx.Node) else None
    if name == "permute":
        dims = [int(d) % rank for d in node.args[1]]  # type: ignore[arg-type, union-attr]
        if dims == [*range(rank - 2), rank - 1, rank - 2]:
            return source if isinstance(source, fx.Node) else None
    return None


def _einsum(node: fx.Node) -> Product | None:
    """Read an einsum over two rank-4 operands whose result is [batch, heads, rows, columns] up to order."""
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:  # type: ignore[arg-type]
        return None
    inputs, out = equation.replace(" ", "").split("->")
    a, b = inputs.split(",")
    left, right = operands  # type: ignore[misc]
    if not len(a) == len(b) == len(out) == 4 or _rank(left) != 4 or _rank(right) != 4:
        return None
    sizes = dict(zip(a, left.meta["val"].shape))
    if not all(same_size(sizes.get(c, n), n) for c, n in zip(b, right.meta["val"].shape)) or len({*a}) + len({*b}) != 8:
        return None  # it broadcasts, or takes a diagonal
    contracted = [c for c in a if c in b and c not in out]
    batch = [c for c in out if c in a and c in b]
    rows, columns = [c for c in out if c in a and c not in b], [c for c in out if c in b and c not in a]
    if not (len(contracted) == len(rows) == len(columns) == 1 and len(batch) == 2):
        return None
    batch = [c for c in a if c in batch]
    canonical = [*batch, *rows, *columns]
    if batch[0] != out[0]:
        return None

    def arranged(source: fx.Node, letters: str, order: list[str]) -> Operand:
        dims = [letters.index(c) for c in order]

        def build(edit: Editor) -> fx.Node:
            return source if dims == [0, 1, 2, 3] else edit.call(torch.ops.aten.permute.default, source, dims)

        return build

    q = arranged(left, a, [*batch, *rows, *contracted])
    k = arranged(right, b, [*batch, *columns, *contracted])
    v = arranged(right, b, [*batch, *contracted, *columns])
    straight = [a.index(c) for c in [*batch, *rows, *contracted]] == [0, 1, 2, 3]
    out_dims = tuple(canonical.index(c) for c in out)
    return Product("einsum", node, left, right, q, k, v, None, None, plain_left=straight, out_dims=out_dims)
