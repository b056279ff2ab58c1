"""Run Duo-LLM layers, a large and a small feed-forward layer of which a token has one or none, on the tokens of each.

A layer is found where its graph computes both for every token and masks, as `effcompile/ops/unequal_experts.py` writes it out,
operation by operation. Which layer a token has stays the source's choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from effcompile.core.plan import Plan
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, Pass, PassResult, copy_graph
from effcompile.ops import unequal_experts as op
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.template import inputs_of, match, template, written_between


@dataclass(frozen=True)
class DispatchUnequal(Pass):
    """Replace masked execution of a large and a small feed-forward layer."""

    name: ClassVar[str] = "dispatch-unequal-experts"
    phase: ClassVar[str] = "raised"

    def run(self, program: Program, plan: Plan) -> PassResult:
        """Return the program with such layers as `eff::unequal_experts_v1`, and a note that says how many there were."""
        count = 0
        for entry in program.entries:
            edit = Editor(copy_graph(entry.graph))
            found = list(_layers(edit.graph))
            for result, operands in found:
                with edit.before(result):
                    edit.replace(result, edit.call(torch.ops.eff.unequal_experts_v1.default, *operands, like=result))
            if found:
                program = program.with_graph(entry, edit.finish())
            count += len(found)
        return PassResult(program, count > 0, (f"{count} pairs of unequal experts dispatched",) if count else ())


def _layers(graph: fx.Graph) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """Yield the result of each layer, and the operands of the op."""
    for node in graph.nodes:
        operands = _operands(node)
        if operands is None:
            continue
        wanted = template(op.written, *operands)
        found = match(wanted, node)
        if found is not None and not written_between(found):
            yield node, tuple(inputs_of(wanted, found))


def _operands(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """Return what a choice between two layers reads, where a node looks like one: the shapes to trace with."""
    if op_name(node) != "where" or not all(isinstance(arg, fx.Node) for arg in node.args):
        return None
    which, large, rest = node.args
    if op_name(which) != "eq" or op_name(large) != "linear" or op_name(rest) != "where":  # type: ignore[arg-type]
        return None
    small = rest.args[1]  # type: ignore[union-attr]
    column = which.args[0]  # type: ignore[union-attr]
    if not isinstance(small, fx.Node) or op_name(small) != "linear" or op_name(column) != "unsqueeze":  # type: ignore[arg-type]
        return None
    both = [_swiglu(large), _swiglu(small)]  # type: ignore[arg-type]
    if both[0] is None or both[1] is None or both[0][0] is not both[1][0]:
        return None
    choice = column.args[0]  # type: ignore[union-attr]
    operands = (both[0][0], choice, *both[0][1:], *both[1][1:])
    fixed = all(isinstance(size, int) for weight in operands[2:] for size in weight.meta["val"].shape)  # type: ignore[union-attr]
    return operands if fixed else None  # type: ignore[return-value]


def _swiglu(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """Return (x, gate, up, down) of down(silu(gate x) * (up x)), or None."""
    product = node.args[0]
    if not isinstance(product, fx.Node) or op_name(product) != "mul" or len(node.args) != 2:
        return None
    active, plain = product.args
    if not isinstance(active, fx.Node) or not isinstance(plain, fx.Node) or op_name(active) != "silu":
        return None
    gated = active.args[0]
    if not isinstance(gated, fx.Node) or any(op_name(n) != "linear" or len(n.args) != 2 for n in (gated, plain)):
        return None
    found = (gated.args[0], gated.args[1], plain.args[1], node.args[1])
    return found if all(isinstance(n, fx.Node) for n in found) else None  # type: ignore[return-value]
