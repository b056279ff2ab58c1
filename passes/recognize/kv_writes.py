"""Read how a graph writes tokens into a tensor that it keeps: `index_copy_`, `index_put_`, a slice that is assigned, or all of it.

Tokens lie along the last dimension but one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from effcompile.core.program import Entry
from effcompile.core.site import Refusal

Locate = Callable[[fx.Node], tuple[str, str]]
"""Return the module path and the source line of a node."""
CODE = "EFF-K208"


@dataclass(frozen=True)
class Write:
    """Hold one write of tokens into a cache: `place` is the node of their places, int64 `[S]`, or the number of the first."""

    node: fx.Node
    base: fx.Node
    place: fx.Node | int
    tokens: fx.Node


def writes_of(entry: Entry, dims: Sequence[int] = (4,)) -> dict[fx.Node, list[Write]]:
    """Return the writes into each input of the graph that could be a cache; one that is not understood counts as well.

    Tokens lie along the last dimension but one of inputs with so many `dims`.
    """
    found: dict[fx.Node, list[Write]] = {}
    for node in entry.graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not node.target._schema.is_mutable or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        target, base = node.args[0], node.args[0]
        while base.op == "call_function" and base.args and isinstance(base.args[0], fx.Node) and is_view(base):
            base = base.args[0]
        value = base.meta.get("val")
        if base.op in ("placeholder", "get_attr") and isinstance(value, torch.Tensor) and value.dim() in dims:
            found.setdefault(base, []).append(_write(node, target, base) or Write(node, base, -1, base))
    return found


def _write(node: fx.Node, target: fx.Node, base: fx.Node) -> Write | None:
    name = node.target._schema.name  # type: ignore[union-attr]
    args: Sequence[Any] = node.args
    dim = base.meta["val"].dim() - 2
    if name == "aten::index_copy_" and target is base and args[1] in (dim, -2):
        return Write(node, base, args[2], args[3])
    if name == "aten::index_put_" and target is base:
        places = list(args[1])
        alone = len(places) == dim + 1 and places[:dim] == [None] * dim and isinstance(places[dim], fx.Node)
        adds = bool(args[3]) if len(args) > 3 else bool(node.kwargs.get("accumulate"))
        if alone and not adds and places[dim].meta["val"].dim() == 1:
            return Write(node, base, places[dim], args[2])
    if name == "aten::copy_" and target is base and isinstance(args[1], fx.Node):
        return None if made_of(args[1], base) else Write(node, base, 0, args[1])
    if name == "aten::copy_" and target.op == "call_function" and isinstance(args[1], fx.Node):
        start = _slice(target, base)
        if start is not None:
            return Write(node, base, start, args[1])
    return None


def made_of(node: fx.Node, base: fx.Node) -> bool:
    """Tell whether a tensor is made of the old tokens of a cache: moved, or beside new ones."""
    seen, left = set[fx.Node](), [node]
    while left:
        one = left.pop()
        if one is base:
            return True
        if one not in seen and one.op == "call_function" and one.target is not torch.ops.eff.attention_v1.default:
            seen.add(one)
            left += one.all_input_nodes
    return False


def _slice(node: fx.Node, base: fx.Node) -> int | None:
    """Return where a slice of the tokens begins whose other dimensions are whole."""
    start, tokens = 0, base.meta["val"].dim() - 2
    while node is not base:
        if node.target is not torch.ops.aten.slice.Tensor:
            return None
        missing: tuple[Any, ...] = (None, 0, None, None, 1)[len(node.args) :]
        given: tuple[Any, ...] = (*node.args, *missing)
        whole, dim, first, last, step = given
        extent = whole.meta["val"].shape[dim]
        if step not in (1, None):
            return None
        if dim == tokens and start == 0 and isinstance(first or 0, int):
            start = int(first or 0)
        elif first not in (0, None) or (isinstance(last, int) and last < extent):
            return None
        node = whole
    return start


def is_view(node: fx.Node) -> bool:
    """Tell whether a node is another form of its first operand, in the same memory."""
    target = node.target
    return (
        node.op == "call_function"
        and isinstance(target, torch._ops.OpOverload)
        and bool(target._schema.returns)
        and any(
            returned.alias_info is not None and not returned.alias_info.is_write for returned in target._schema.returns
        )
    )


def unknown(write: Write) -> Refusal:
    """Say why a write is not understood."""
    if any(made_of(x, write.base) for x in write.node.args[1:] if isinstance(x, fx.Node)):
        return Refusal(
            CODE,
            "its tokens are moved at every call, as in a window that slides by copying",
            "index_copy_(2, places, tokens), and a mask that hides what the window has left",
        )
    return Refusal(
        CODE, f"`{write.node.target}` writes it in a way that is not known", "index_copy_(2, places, tokens)"
    )
