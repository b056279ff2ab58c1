"""Keep the layout in memory of an attention's result where anything can tell: `view`, `as_strided`, the caller of the graph.

FlexAttention lays its result out like its queries, other kernels in their own way. A `view` that was recorded on one layout is
an error on another, and `as_strided` reads other elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effcompile.core.rewrite import Editor
from effcompile.passes.recognize.aliases import shares
from effcompile.passes.recognize.elements import op_name

_TELLING = ("view", "as_strided", "view_as_real", "view_as_complex", "unfold")


def tells_layout(node: fx.Node) -> bool:
    """Tell whether a reader of a value, or of a view of it, depends on its strides."""
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        value = waiting.pop()
        for user in value.users:
            if user.op == "output" or op_name(user) in _TELLING:
                return True
            if user not in seen and shares(user, value):
                seen.add(user)
                waiting.append(user)
    return False


def laid_out(edit: Editor, node: fx.Node, like: torch.Tensor) -> fx.Node:
    """Return `node` with its dimensions in memory in the order of `like`; no copy where a kernel gives it so."""
    aten, strides = torch.ops.aten, [_hint(stride) for stride in like.stride()]
    if any(stride is None for stride in strides):
        return node
    order = sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim))
    inverse = [order.index(dim) for dim in range(len(order))]
    dense = edit.call(aten.contiguous.default, edit.call(aten.permute.default, node, order))
    return edit.call(aten.permute.default, dense, inverse)


def _hint(stride: Any) -> Any:
    """Return the value that tracing met; the order of strides is settled for the graph, so no guard is added."""
    return stride if isinstance(stride, int) else stride.node.hint
