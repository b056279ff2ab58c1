"""Check a program after a rewrite: same inputs, same outputs, recorded shapes, nothing dangling."""

from __future__ import annotations

import torch
from torch import fx

from effcompile.core.errors import RewriteError
from effcompile.core.program import Program
from effcompile.core.rewrite import require_inputs

SHORTENED = "eff.shortened"
"""The mark of a returned value that is shorter than in the source because the user asked for that: a layer's cache."""

CARRIED = "eff.carried"
"""The mark of a value that a program returns behind its own results: state that a policy carries from call to call."""


def verify(before: Program, after: Program, name: str) -> Program:
    """Return `after`; raise EFF-X901 naming the pass where it broke the contract of a rewrite."""
    for old, new in zip(before.entries, after.entries, strict=True):
        try:
            new.graph.graph.lint()
            nodes = list(new.graph.graph.nodes)
            require_inputs(nodes)
            old_inputs = [n.name for n in old.graph.graph.nodes if n.op == "placeholder"]
            new_inputs = [n.name for n in nodes if n.op == "placeholder"]
            if new_inputs[: len(old_inputs)] != old_inputs:
                raise RewriteError("EFF-X901", "inputs changed")
            _same_outputs(old.graph.graph, new.graph.graph)
            for node in nodes:
                if node.op == "call_function" and "val" not in node.meta and node.users and _is_aten(node):
                    raise RewriteError("EFF-X901", f"`{node.name}` has no recorded value")
        except (RewriteError, RuntimeError) as error:
            raise RewriteError("EFF-X901", f"pass `{name}` left a broken graph: {error}") from error
    return after


def _is_aten(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def _same_outputs(old: fx.Graph, new: fx.Graph) -> None:
    a, b = (_results(graph) for graph in (old, new))
    if len(a) != len(b):
        raise RewriteError("EFF-X901", f"{len(a)} outputs became {len(b)}")
    for number, (first, second) in enumerate(zip(a, b)):
        x, y = first.meta.get("val"), second.meta.get("val")
        if isinstance(x, torch.Tensor) != isinstance(y, torch.Tensor):
            raise RewriteError("EFF-X901", f"output {number} changed its kind")
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            if x.dtype != y.dtype or x.device != y.device or len(x.shape) != len(y.shape):
                raise RewriteError(
                    "EFF-X901", f"output {number}: {x.dtype}{list(x.shape)} became {y.dtype}{list(y.shape)}"
                )
            fixed = [(p, q) for p, q in zip(x.shape, y.shape) if isinstance(p, int) and isinstance(q, int)]
            if any(p != q for p, q in fixed) and not second.meta.get(SHORTENED):
                raise RewriteError("EFF-X901", f"output {number}: {list(x.shape)} became {list(y.shape)}")


def _results(graph: fx.Graph) -> list[fx.Node]:
    output = next(node for node in graph.nodes if node.op == "output")
    flat: list[fx.Node] = []

    def collect(node: fx.Node) -> fx.Node:
        flat.append(node)
        return node

    fx.node.map_arg(output.args, collect)
    return [node for node in flat if not node.meta.get(CARRIED)]
