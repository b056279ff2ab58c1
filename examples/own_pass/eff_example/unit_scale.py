"""Remove multiplications by one, which configurations such as `residual_multiplier: 1.0` leave in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from effcompile.core.plan import Plan
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, Pass, PassResult, copy_graph


@dataclass(frozen=True)
class RemoveUnitScale(Pass):
    """Replace `x * 1.0` by `x`.

    It runs on the graph as it was captured, before attention is recognized. Gradients flow through it: the derivative
    of `x * 1.0` is 1.
    """

    name: ClassVar[str] = "remove-unit-scale"
    phase: ClassVar[str] = "captured"
    after: ClassVar[tuple[str, ...]] = ("remove-identities",)
    differentiable: ClassVar[bool] = True

    def run(self, program: Program, plan: Plan) -> PassResult:
        """Return the program without them; the given one stays as it is."""
        removed = 0
        for entry in program.entries:
            edit = Editor(copy_graph(entry.graph))
            if any(_writes(node) for node in edit.graph.nodes):
                continue  # `x * 1.0` is a fresh tensor and `x` is not: with writes around, that may matter
            for node in list(edit.graph.nodes):
                if _is_unit_scale(node):
                    edit.replace(node, node.args[0])
                    removed += 1
            program = program.with_graph(entry, edit.finish())
        return PassResult(program, removed > 0, (f"{removed} multiplications by one removed",) if removed else ())


def _is_unit_scale(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.mul.Tensor or node.args[1] != 1.0 or isinstance(node.args[1], fx.Node):
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    same = source.meta["val"].dtype == node.meta["val"].dtype  # integers become floats here
    returned = any(user.op == "output" for user in node.users)  # the caller must not get its own input back
    return same and not returned


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
