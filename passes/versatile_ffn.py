"""Run VersatileFFN layers on the loops and experts that each token has: one more product for all experts, no loop for nobody.

A layer is found where its graph computes what `effcompile/ops/versatile_ffn.py` writes out, operation by operation: no bias, no
dropout, a gate for each pair of columns, experts that are the slices of the inner width in order. Routing stays the source's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, fx

from effcompile.core.plan import Plan
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, Pass, PassResult, copy_graph
from effcompile.ops import versatile_ffn as op
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.template import Found, Template, inputs_of, match, template, written_between


@dataclass(frozen=True)
class FoldVirtualExperts(Pass):
    """Replace VersatileFFN layers whose loops and experts all run for every token."""

    name: ClassVar[str] = "fold-virtual-experts"
    phase: ClassVar[str] = "raised"

    def run(self, program: Program, plan: Plan) -> PassResult:
        """Return the program with its VersatileFFN layers as `eff::versatile_ffn_v1`, and a note that says how many there were."""
        count = 0
        for entry in program.entries:
            edit = Editor(copy_graph(entry.graph))
            here = 0
            for result, wanted, found, (depth, eps) in list(_layers(edit.graph)):
                x, _, _, norm, gate, up, down, *_ = inputs_of(wanted, found)
                last, shares = (found[node] for node in wanted.outputs[1:])
                operands = (x, last, shares, norm, gate, up, down, depth, eps)
                with edit.before(result):
                    edit.replace(result, edit.call(torch.ops.eff.versatile_ffn_v1.default, *operands, like=result))
                here += 1
            if here:
                program = program.with_graph(entry, edit.finish())
            count += here
        return PassResult(program, count > 0, (f"{count} VersatileFFN layers folded",) if count else ())


Epsilon: TypeAlias = "float | fx.Node"
"""A number, or the node of one that is an input of the graph: Dynamo makes a float so under `dynamic=True`."""
Layer: TypeAlias = tuple[fx.Node, Template, Found, tuple[int, Epsilon]]


def _layers(graph: fx.Graph) -> Iterator[Layer]:
    """Yield each layer's result, template, match, and (loops at most, epsilon of its norm)."""
    added = _epsilons(graph)
    for topk in (node for node in graph.nodes if op_name(node) == "topk"):
        routed = _routed(topk)
        if routed is None or not isinstance(topk.args[1], int):
            continue
        x, width_router = routed
        pairs = [(node, _routed(node)) for node in graph.nodes if op_name(node) == "argmax"]
        for depth_router in (found[1] for _, found in pairs if found is not None and found[0] is x):
            yield from _layer(graph, (x, depth_router, width_router), topk.args[1], added)


def _layer(
    graph: fx.Graph, routing: tuple[fx.Node, fx.Node, fx.Node], top_k: int, epsilons: list[Epsilon]
) -> Iterator[Layer]:
    x, depth_router, width_router = routing
    sizes = (*_shape(depth_router)[:1], *_shape(width_router))
    if len(sizes) != 3:
        return
    depth, experts, wide = sizes
    weights = {node.args[1] for node in graph.nodes if op_name(node) == "linear" and len(node.args) == 2}
    firsts = [w for w in weights if _shape(w)[1:] == (wide,) and op_name(w) != "slice"]
    for gate in {_shape(w): w for w in firsts if _shape(w)[0] % experts == 0}.values():
        inner = _shape(gate)[0]
        norm = next(
            (n for n in graph.nodes if _shape(n) == (wide,) and n.meta["val"].dtype == x.meta["val"].dtype), None
        )
        down = next((w for w in weights if _shape(w) == (wide, inner)), None)
        if norm is None or down is None:
            continue
        for eps in epsilons:
            given = (eps,) if isinstance(eps, fx.Node) else ()
            wanted = template(_spelled(top_k, eps), x, depth_router, width_router, norm, gate, gate, down, *given)
            for node in graph.nodes:
                if node.target != wanted.outputs[0].target:
                    continue
                found = match(wanted, node)
                if found is not None and inputs_of(wanted, found)[0] is x and not written_between(found):
                    yield node, wanted, found, (depth, eps)


def _spelled(top_k: int, eps: Epsilon) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return how a layer is written, of its tokens and weights, and of its epsilon where that is a node."""

    def fixed(
        x: Tensor, d: Tensor, w: Tensor, n: Tensor, g: Tensor, u: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return op.written(x, d, w, n, g, u, v, top_k, eps)  # type: ignore[arg-type]

    def given(
        x: Tensor, d: Tensor, w: Tensor, n: Tensor, g: Tensor, u: Tensor, v: Tensor, e: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return op.written(x, d, w, n, g, u, v, top_k, e)

    return given if isinstance(eps, fx.Node) else fixed


def _routed(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the operand and the weight of the linear that a node reads, or None."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or op_name(source) != "linear" or len(source.args) != 2:
        return None
    x, weight = source.args
    return (x, weight) if isinstance(x, fx.Node) and isinstance(weight, fx.Node) else None


def _epsilons(graph: fx.Graph) -> list[Epsilon]:
    """Return the numbers that are added to a mean."""
    found = [
        node.args[1]
        for node in graph.nodes
        if op_name(node) == "add" and isinstance(node.args[0], fx.Node) and op_name(node.args[0]) == "mean"
    ]
    return list(dict.fromkeys(value for value in found if isinstance(value, float) or _is_number(value)))


def _is_number(node: object) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.SymFloat)


def _shape(node: object) -> tuple[int, ...]:
    """Return the shape of a node's tensor where it is all numbers, else ()."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
    return shape if all(isinstance(size, int) for size in shape) else ()
