"""Tell which graph values share storage, and which in-place writes lie between two places of a graph.

The answer comes from the fake tensors that tracing recorded: a view shares the storage of what it looks at, a copy does not. So a
`reshape` that copies, a `split` and an `out=` argument need no rule of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_PURE = frozenset({"flex_attention"})  # higher-order ops that write to none of their operands


@dataclass(frozen=True)
class Write:
    """Record that `node` overwrites the elements of `view` (an alias of one storage) at position `at`."""

    node: fx.Node
    view: fx.Node
    at: int


class Aliases:
    """Hold the order, the storages and the writes of one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: number for number, node in enumerate(graph.nodes)}
        self._owner: dict[int, fx.Node] = {}
        self._writes: dict[int, list[Write]] = {}
        self._fences: list[tuple[int, fx.Node]] = []
        for node, at in self.order.items():
            for storage in storages(node):
                self._owner.setdefault(storage, node)
            for view in written(node):
                for storage in storages(view):
                    self._writes.setdefault(storage, []).append(Write(node, view, at))
            if _is_fence(node):
                self._fences.append((at, node))

    def root(self, node: fx.Node) -> fx.Node:
        """Return the first node with the storage of `node`; `node` itself where it owns its storage or has none."""
        return next((self._owner[s] for s in storages(node) if s in self._owner), node)

    def writes(self, node: fx.Node) -> list[Write]:
        """Return every write to the storage of `node`, in order."""
        found = {write for storage in storages(node) for write in self._writes.get(storage, ())}
        return sorted(found, key=lambda write: write.at)

    def last_write(self, node: fx.Node, before: int) -> int:
        """Return the position of the last write to the storage of `node` before a position, -1 where there is none."""
        return max((write.at for write in self.writes(node) if write.at < before), default=-1)

    def written_between(
        self, node: fx.Node, after: int, before: int, expected: Collection[fx.Node] = ()
    ) -> fx.Node | None:
        """Return a node that writes to the storage of `node` strictly between two positions and is not expected to."""
        return next((w.node for w in self.writes(node) if after < w.at < before and w.node not in expected), None)

    def fence_between(self, after: int, before: int) -> fx.Node | None:
        """Return a node between two positions that turns gradients or autocast on or off: nothing may be moved across it."""
        return next((node for at, node in self._fences if after < at < before), None)


def storages(node: fx.Node) -> frozenset[int]:
    """Return the identities of the storages that a value of the graph looks at."""
    return frozenset(_storages(node.meta.get("val")))


def _storages(value: Any) -> Iterator[int]:
    if isinstance(value, torch.Tensor):
        if value.layout == torch.strided:
            yield value.untyped_storage()._cdata
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _storages(item)


def shares(node: fx.Node, source: Any) -> bool:
    """Tell whether `node` looks at the storage of `source`."""
    return isinstance(source, fx.Node) and bool(storages(node) & storages(source))


def written(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the operands that a node writes to; of a higher-order op that is not known to be pure, all of them."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if not target._schema.is_mutable:
            return ()
        found: list[fx.Node] = []
        for place, argument in enumerate(target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
                found += given if isinstance(given, list | tuple) else [given]  # type: ignore[list-item]
        return tuple(item for item in found if isinstance(item, fx.Node))
    if isinstance(target, torch._ops.HigherOrderOperator):
        return () if target.name() in _PURE else tuple(node.all_input_nodes)
    return ()


def _is_fence(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") in ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")
