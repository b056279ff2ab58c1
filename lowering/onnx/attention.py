"""Attention before opset 23, as two products and a softmax that a runtime can fuse.

Keys are transposed where they are multiplied (a runtime's product does that by itself), the scale is multiplied once, heads that
share keys are rows of one product instead of copies of the keys, and masks are made once for all layers. torch's own translation
makes a mask for every layer, reshapes and copies the keys, and scales both operands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from effcompile.core.rewrite import Editor

_ATEN = torch.ops.aten
_SDPA = _ATEN.scaled_dot_product_attention.default


def open_attention(edit: Editor) -> None:
    """Write out every attention of a graph that is left."""
    for node in list(edit.graph.find_nodes(op="call_function", target=_SDPA)):
        given: Any = (*node.args, None, 0.0, False)[:6]
        q, k, v, mask, dropout, causal = given
        if dropout or not _takes(q, k, v):
            continue
        bias, scale = _bias(edit, q, k, mask, bool(causal)), node.kwargs.get("scale")
        width = int(q.meta["val"].shape[3])
        with edit.before(node):
            edit.replace(node, _written(edit, q, k, v, bias, width**-0.5 if scale is None else float(scale)))  # type: ignore[arg-type]


def _takes(*operands: fx.Node) -> bool:
    """Tell whether q, k and v are `[B, H, S, D]` of one batch, with heads that share keys evenly."""
    shapes = [x.meta["val"].shape for x in operands]
    if any(len(shape) != 4 for shape in shapes) or len({str(shape[0]) for shape in shapes}) != 1:
        return False
    heads = [shape[1] for shape in shapes]
    return all(isinstance(n, int) for n in heads) and heads[0] % heads[1] == 0 and heads[1] == heads[2]


def _written(edit: Editor, q: fx.Node, k: fx.Node, v: fx.Node, bias: fx.Node | None, scale: float) -> fx.Node:
    batch, heads, rows, _ = q.meta["val"].shape
    groups, keys = k.meta["val"].shape[1:3]
    shared = heads != groups
    query = edit.call(_ATEN.mul.Tensor, q, scale)
    if shared:  # rows of all heads of a group, under one another
        query = _shaped(edit, query, (batch, groups, None, q.meta["val"].shape[3]))
    scores = edit.call(_ATEN.matmul.default, query, edit.call(_ATEN.transpose.int, k, 2, 3))
    if bias is not None:
        if shared:
            scores = _shaped(edit, scores, (batch, heads, rows, keys))
        scores = edit.call(_ATEN.add.Tensor, scores, bias)
    share = edit.call(_ATEN.softmax.int, scores, -1)
    if bias is not None and shared:
        share = _shaped(edit, share, (batch, groups, None, keys))
    found = edit.call(_ATEN.matmul.default, share, v)
    return _shaped(edit, found, (batch, heads, rows, v.meta["val"].shape[3])) if shared else found


def _shaped(edit: Editor, x: fx.Node, shape: tuple[Any, ...]) -> fx.Node:
    """Reshape; a size None is what is left."""
    return edit.call(_ATEN.reshape.default, x, [-1 if size is None else edit.size(size) for size in shape])


def _bias(edit: Editor, q: fx.Node, k: fx.Node, mask: Any, causal: bool) -> fx.Node | None:
    """Return what is added to the scores, made once for all attentions that have the same."""
    kind = q.meta["val"].dtype
    if isinstance(mask, fx.Node):
        if mask.meta["val"].dtype != torch.bool:
            return mask
        return edit.shared(("added", mask, kind), (mask,), lambda: edit.inline(lambda x: _added(x, kind), mask))
    if not causal:
        return None
    sizes = [edit.size(x.meta["val"].shape[2]) for x in (q, k)]

    def make() -> fx.Node:
        full = edit.call(_ATEN.full.default, sizes, -torch.inf, dtype=kind)
        return edit.call(_ATEN.triu.default, full, 1)

    return edit.shared(("causal", *sizes, kind), sizes, make)


def _added(keep: Tensor, kind: torch.dtype) -> Tensor:
    return torch.where(keep, 0.0, -torch.inf).to(kind)
