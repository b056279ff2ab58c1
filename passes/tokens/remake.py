"""Make an operation anew on another number of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from effcompile.core.rewrite import Editor
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.token_axis import VIEWS, Axis, Place

aten = torch.ops.aten


def remade(
    edit: Editor, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], axis: Axis | None, count: int
) -> fx.Node:
    """Insert an operation with operands of `count` tokens; a shape that it names gets that number where its tokens lie."""
    name = op_name(node)
    if axis is None or (name not in VIEWS and name != "expand"):
        return edit.call(node.target, *args, like=node, **kwargs)  # type: ignore[arg-type]
    shape = [_extent(edit, size, dim, axis.tokens, count) for dim, size in enumerate(node.meta["val"].shape)]
    op = aten.expand.default if name == "expand" else aten.reshape.default
    return edit.call(op, args[0], shape, like=node)


def _extent(edit: Editor, size: Any, dim: int, place: Place, count: int) -> Any:
    if dim != place.dim:
        return edit.size(size)
    factor = place.before * place.after * count
    return factor if isinstance(factor, int) else edit.symbolic(factor)
