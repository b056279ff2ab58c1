"""RotaryEmbedding (opset 23): x cos + rotate_half(x) sin, with an angle for each position of each sequence.

cos and sin are given for every sequence of the batch, `[B, S, D/2]`: tables of batch 1, which torch's own exporter makes, run for
no other batch. Only angles whose two halves are proved equal are taken, since the operator reads one half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from effcompile.core.export_form import Dialect, OnnxForm, Placement, Sites
from effcompile.core.rewrite import Editor

_ATEN = torch.ops.aten
_THROUGH = (_ATEN.to.dtype, _ATEN._to_copy.default, _ATEN.contiguous.default, _ATEN.clone.default)


@dataclass(frozen=True)
class Rope(OnnxForm):
    """Find the sum of two products that turns queries or keys `[B, H, S, D]`."""

    name: ClassVar[str] = "rope"

    def places(self, edit: Editor, dialect: Dialect, sites: Sites) -> Iterator[Placement]:
        """Yield every rotation of whole heads by angles that do not depend on the head."""
        if dialect.opset < 23:
            return
        for node in list(edit.graph.find_nodes(op="call_function", target=_ATEN.add.Tensor)):
            found = _read(node)
            if found is None:
                continue
            x, cos, sin = found
            halves = []
            for table in (cos, sin):
                key = (table, str(x.meta["val"].shape[0]))
                halves.append(edit.shared(key, (table,), lambda t=table, x=x: _half(edit, t, x)))  # type: ignore[misc]
            yield Placement(self.name, "RotaryEmbedding", (x, *halves), (node,), rotated)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x `[B, H, S, D]` by angles `[B, S, D/2]`."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _half(edit: Editor, table: fx.Node, x: fx.Node) -> fx.Node:
    batch, _, _, width = x.meta["val"].shape
    first = edit.call(_ATEN.slice.Tensor, table, 2, 0, int(width) // 2)
    return edit.call(_ATEN.expand.default, first, [edit.size(batch), -1, -1])


def _read(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Return x and the tables `[B or 1, S, D]` of the rotation that ends in a node, else None."""
    if len(node.args) != 2 or node.kwargs:
        return None
    for left, right in (node.args, node.args[::-1]):
        plain, turned = _product(left), _product(right)
        if plain is None or turned is None:
            continue
        for x, cos in (plain, plain[::-1]):
            for rotated_x, sin in (turned, turned[::-1]):
                if _rotates(rotated_x, x):
                    tables = [_table(t, function) for t, function in ((cos, "cos"), (sin, "sin"))]
                    if None not in tables:
                        return x, tables[0], tables[1]  # type: ignore[return-value]
    return None


def _product(node: Any) -> tuple[fx.Node, fx.Node] | None:
    if not isinstance(node, fx.Node) or node.target != _ATEN.mul.Tensor or len(node.users) != 1:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def _rotates(node: fx.Node, x: fx.Node) -> bool:
    """Tell whether a node is (-second half, first half) of x along the last of four dimensions."""
    value = x.meta.get("val")
    if node.target != _ATEN.cat.default or not isinstance(value, Tensor) or value.dim() != 4:
        return False
    parts, dim = (*node.args, 0)[:2]
    if dim not in (-1, 3) or len(parts) != 2 or not isinstance(value.shape[3], int):  # type: ignore[arg-type]
        return False
    second, first = parts  # type: ignore[misc]
    if second.target != _ATEN.neg.default:
        return False
    half = value.shape[3] // 2
    return _slice(second.args[0], x, half, value.shape[3]) and _slice(first, x, 0, half)


def _slice(node: Any, x: fx.Node, start: int, end: int) -> bool:
    if not isinstance(node, fx.Node) or node.target != _ATEN.slice.Tensor:
        return False
    given: list[Any] = [*node.args, *(None, 0, 0, 2**62, 1)[len(node.args) :]]
    source, dim, begin, stop, step = given
    if source is not x or dim not in (-1, 3) or step != 1 or not isinstance(stop, int):
        return False
    return (begin or 0) == start and min(stop, int(x.meta["val"].shape[3])) == end


def _table(node: fx.Node, function: str) -> fx.Node | None:
    """Return the table `[B or 1, S, D]` behind `unsqueeze(table, 1)` where both of its halves are proved equal."""
    if node.target != _ATEN.unsqueeze.default or node.args[1] != 1:
        return None
    table = node.args[0]
    inner: Any = table
    while isinstance(inner, fx.Node):
        scaled = inner.target == _ATEN.mul.Tensor and isinstance(inner.args[1], int | float)
        if inner.target not in _THROUGH and not scaled:
            break
        inner = inner.args[0]
    if not isinstance(inner, fx.Node) or str(inner.target) != f"aten.{function}.default":
        return None
    angles = inner.args[0]
    if not isinstance(angles, fx.Node) or angles.target != _ATEN.cat.default:
        return None
    parts, dim = (*angles.args, 0)[:2]
    if len(parts) != 2 or parts[0] is not parts[1] or dim not in (-1, 2):  # type: ignore[arg-type, index]
        return None
    return table if isinstance(table, fx.Node) and table.meta["val"].dim() == 3 else None
