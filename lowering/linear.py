"""Run float linear layers through oneDNN where it beats the BLAS that torch links.

torch's CPU wheel runs `linear` through MKL, which on AMD processors reaches 0.75 to 0.87 of oneDNN's rate at the sizes of
transformer layers (bench/results/linear-table.json). The weight stays the user's own tensor: oneDNN packs it inside the call, so an
updated weight is seen. One row (decode) is bound by memory and stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from effcompile.core import compat
from effcompile.core.plan import Plan
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, Pass, PassResult, copy_graph

_ROWS = 64  # below this the packing inside the call costs more than it gains


@dataclass(frozen=True)
class SelectLinear(Pass):
    """Replace `aten.linear` by oneDNN's linear on CPU."""

    name: ClassVar[str] = "select-linear"
    phase: ClassVar[str] = "lowered"

    def run(self, program: Program, plan: Plan) -> PassResult:
        """Return the program with large enough float linears replaced."""
        if program.device != "cpu" or not compat.has_mkldnn_linear():
            return PassResult(program)
        count = 0
        for entry in program.entries:
            edit = Editor(copy_graph(entry.graph))
            for node in list(edit.graph.nodes):
                if node.target is torch.ops.aten.linear.default and _pays(node):
                    with edit.before(node):
                        bias = node.args[2] if len(node.args) > 2 else None
                        op = torch.ops.eff.linear_v1.default
                        call = edit.call(op, node.args[0], node.args[1], bias, like=node)
                    edit.replace(node, call)
                    count += 1
            program = program.with_graph(entry, edit.finish())
        return PassResult(program, count > 0, (f"{count} linears on oneDNN",) if count else ())


def _pays(node: fx.Node) -> bool:
    x, weight = node.args[0], node.args[1]
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    value, matrix = x.meta["val"], weight.meta["val"]
    if value.dtype not in (torch.float32, torch.bfloat16) or matrix.dtype != value.dtype or weight.op != "placeholder":
        return False
    if node.meta["val"].dtype != value.dtype:  # autocast decides the dtype of this call
        return False
    if matrix.dim() != 2 or value.dim() < 2:
        return False
    rows: Any = 1
    for extent in value.shape[:-1]:
        rows = rows * (extent if isinstance(extent, int) else _ROWS)
    return bool(rows >= _ROWS)
