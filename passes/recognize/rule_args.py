"""Read the arguments of an op in mask code."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effcompile.core.expr import BOOL, INT
from effcompile.passes.recognize.elements import Unreadable

_INTEGERS = (torch.int64, torch.int32)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument that may be given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def dtype_of(node: fx.Node) -> torch.dtype:
    """Return the recorded dtype of a tensor node."""
    return node.meta["val"].dtype


def checked(node: fx.Node) -> torch.dtype:
    """Return the dtype to compute in, one integer type for both index dtypes; refuse the others, which wrap around."""
    dtype = dtype_of(node)
    if dtype == BOOL or dtype.is_floating_point:
        return dtype
    if dtype in _INTEGERS:
        return INT
    raise Unreadable(f"`{node.name}` computes in {dtype}")
