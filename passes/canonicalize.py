"""Remove operations that do nothing, so that every recognizer sees one spelling.

Only identities are removed: dropout outside training, casts to the same dtype, slices of the whole extent, expands to the same
shape. A node whose result is returned, or whose storage is written in place, stays: the caller may rely on a fresh tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from effcompile.core.plan import Plan
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, Pass, PassResult, copy_graph
from effcompile.passes.recognize.elements import is_write, op_name

_END = 2**31


@dataclass(frozen=True)
class RemoveIdentities(Pass):
    """Drop no-op nodes from every graph."""

    name: ClassVar[str] = "remove-identities"
    phase: ClassVar[str] = "captured"
    portable: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def run(self, program: Program, plan: Plan) -> PassResult:
        """Return the program without identities."""
        removed = 0
        for entry in program.entries:
            edit = Editor(copy_graph(entry.graph))
            removed += _drop_constant_detach(edit.graph) + _drop_metadata_assertions(edit.graph)
            written = _written_roots(edit.graph)
            for node in list(edit.graph.nodes):
                source = identity_of(node)
                if source is None or _returned(node) or node in written or source in written:
                    continue
                node.replace_all_uses_with(source)
                edit.graph.erase_node(node)
                removed += 1
            program = program.with_graph(entry, edit.finish())
        return PassResult(program, removed > 0, (f"{removed} identities removed",))


def _drop_constant_detach(graph: fx.Graph) -> int:
    """Remove `torch.tensor(...)`'s in-place detach of a fresh constant: it is no write, and would stop outlining."""
    found = [node for node in graph.nodes if op_name(node) == "detach_" and not node.meta["val"].requires_grad]
    found = [node for node in found if op_name(node.args[0]) in ("lift_fresh_copy", "lift_fresh", "empty", "clone")]
    for node in found:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return len(found)


def _drop_metadata_assertions(graph: fx.Graph) -> int:
    """Remove the exporter's checks that a value has the dtype its own node records; they count as readers otherwise."""
    found = [node for node in graph.nodes if op_name(node) == "_assert_tensor_metadata" and not node.users]
    for node in found:
        graph.erase_node(node)
    return len(found)


def identity_of(node: fx.Node) -> fx.Node | None:
    """Return the node whose value `node` repeats, else None."""
    name = op_name(node)
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    old, new = source.meta.get("val"), node.meta.get("val")
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return None
    if name == "dropout":
        return source if node.args[2] is False or node.args[1] == 0.0 else None
    if name in ("alias", "contiguous", "to", "expand", "view", "reshape", "slice"):
        if name == "contiguous" and not _same_strides(old, new):
            return None
        if name == "to" and (node.kwargs.get("copy") or (len(node.args) > 3 and node.args[3] is True)):
            return None
        if name == "slice" and not _whole(node, old):
            return None
        return source if old.dtype == new.dtype and old.device == new.device and _same_shape(old, new) else None
    return None


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    return len(a.shape) == len(b.shape) and all(_same(x, y) for x, y in zip(a.shape, b.shape))


def _same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    return all(_same(x, y) for x, y in zip(a.stride(), b.stride()))


def _same(x: Any, y: Any) -> bool:
    """Compare sizes without adding a guard."""
    if isinstance(x, int) and isinstance(y, int):
        return x == y
    if isinstance(x, torch.SymInt) and isinstance(y, torch.SymInt):
        return bool(x.node.expr == y.node.expr)
    return False


def _whole(node: fx.Node, source: torch.Tensor) -> bool:
    dim, begin, end, step = ([*node.args[1:], None, None, None, None])[:4]
    if (begin not in (None, 0)) or (step not in (None, 1)):
        return False
    extent = source.shape[int(dim or 0)]  # type: ignore[call-overload]
    end = end.meta["val"] if isinstance(end, fx.Node) else end
    return end is None or (isinstance(end, int) and end >= _END) or _same(end, extent)


def _returned(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _written_roots(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that share storage with an in-place write."""
    parent: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while node in parent:
            node = parent[node]
        return node

    written: set[fx.Node] = set()
    for node in graph.nodes:
        if node.args and isinstance(node.args[0], fx.Node) and isinstance(node.meta.get("val"), torch.Tensor):
            if _may_share(node):
                parent[node] = node.args[0]
            if is_write(node):
                written.add(root(node))
    return {node for node in graph.nodes if root(node) in written}


def _may_share(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return (
        is_write(node)
        or target.is_view
        or op_name(node) in ("to", "contiguous", "reshape", "dropout", "detach", "flatten")
    )
