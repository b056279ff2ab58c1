"""Find the repeated block of a model in its graph, and call it once per layer instead of repeating it.

A transformer's layers trace to the same run of nodes again and again. The run is found by structure: equal operations, literals,
shapes and strides at equal distances; class names play no part. One layer becomes a sub-graph, each repetition an
`invoke_subgraph` call with that layer's weights, so that TorchInductor lowers and compiles it once, while one `compile_fx` keeps
one cache key. Layers that write in place, as a static KV cache does, are cut at the writes, which stay in the outer graph, between
two calls: a sub-graph that writes would have to be made functional, and its caches copied. Layers that differ stay as they are,
with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from effcompile.core import compat
from effcompile.core.plan import Plan
from effcompile.core.program import Entry, Program
from effcompile.core.repeats import MIN_REPEATS, Columns, Wiring, between_writes, find_block, wire
from effcompile.core.rewrite import Pass, PassResult, copy_graph, copy_meta
from effcompile.passes.recognize.aliases import storages, written


@dataclass(frozen=True)
class OutlineLayers(Pass):
    """Outline the longest repetition of every graph."""

    name: ClassVar[str] = "outline-layers"
    phase: ClassVar[str] = "lowered"
    after: ClassVar[tuple[str, ...]] = ("select-linear",)

    def run(self, program: Program, plan: Plan) -> PassResult:
        """Return the program with repeated layers called through `invoke_subgraph`."""
        if not compat.has_invoke_subgraph():
            return PassResult(program, False, ("this torch has no invoke_subgraph",))
        notes: list[str] = []
        changed = False
        for entry in program.entries:
            graph, note = outline(entry)
            notes.append(note)
            if graph is not None:
                program, changed = program.with_graph(entry, graph), True
        return PassResult(program, changed, tuple(notes))


def outline(entry: Entry) -> tuple[fx.GraphModule | None, str]:
    """Return the outlined copy of an entry's graph, or None, and a note that says what was found."""
    module = copy_graph(entry.graph)
    _hoist_constants(module.graph)
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    block = find_block(nodes, signature)
    if block is None:
        return None, "no repeated layers"
    runs = block.runs(nodes)
    if any(written(node) for node in runs[0]):
        found = _free_of_writes(between_writes(nodes, block, lambda node: bool(written(node))).runs(nodes))
        if isinstance(found, str):
            return None, f"{block.count} repetitions stay: {found}"
        runs = found
    shape = _shape_of(runs)
    if isinstance(shape, str):
        return None, f"{block.count} repetitions stay: {shape}"
    _build(module, runs, shape.inputs, shape.outputs)
    module.graph.lint()
    module.recompile()
    sizes = f"{len(shape.inputs)} inputs, {len(shape.outputs)} outputs"
    return module, f"{len(runs)} layers of {len(runs[0])} nodes, {sizes}"


def _hoist_constants(graph: fx.Graph) -> None:
    """Move reads of constants in front of the first computation: a layer's own constant is one of its inputs."""
    first = next((node for node in graph.nodes if node.op == "call_function"), None)
    if first is not None:
        for node in [node for node in graph.nodes if node.op == "get_attr"]:
            first.prepend(node)


# --- finding the repetition --------------------------------------------------------------------------------------------


def signature(node: fx.Node) -> str:
    """Return what must agree between repetitions: the operation, its literals, and the shape and strides of its result."""
    args = fx.node.map_arg((node.args, node.kwargs), lambda arg: _Hole(_layout(arg.meta.get("val"))))
    return f"{node.target}|{args}|{_layout(node.meta.get('val'))}"


class _Hole:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"<{self.text}>"


def _layout(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{tuple(value.stride())}{value.device}"
    if isinstance(value, list | tuple):
        return "(" + ",".join(_layout(item) for item in value) + ")"
    return str(type(value).__name__)


# --- writes in place -------------------------------------------------------------------------------------------------------


def _free_of_writes(runs: Sequence[Sequence[fx.Node]]) -> list[Sequence[fx.Node]] | str:
    """Return the runs without their writes, which move behind the last node of each; or why they cannot."""
    if len(runs) < MIN_REPEATS:
        return "too few lie between in-place writes"
    free: list[Sequence[fx.Node]] = []
    late: list[list[fx.Node]] = []
    for run in runs:
        writes: list[fx.Node] = []
        over: set[int] = set()
        for node in run:
            if targets := written(node):
                if not isinstance(node.target, torch._ops.OpOverload):
                    return f"`{node.target}` cannot be outlined"
                writes.append(node)
                over.update(*map(storages, targets))
            elif any(value in writes or storages(value) & over for value in (node, *node.all_input_nodes)):
                return f"`{node.target}` reads what the same layer has just written in place"
        free.append([node for node in run if node not in writes])
        late.append(writes)
    for run, writes in zip(free, late):
        place = run[-1]
        for node in writes:
            place.append(node)
            place = node
    return free


# --- what a repetition reads and returns ---------------------------------------------------------------------------------


def _shape_of(runs: Sequence[Sequence[fx.Node]]) -> Wiring | str:
    """Return what the repeated run reads and returns, or why it cannot be one sub-graph."""
    for first in runs[0]:
        target = first.target
        if not isinstance(target, torch._ops.OpOverload) and target not in (
            operator.getitem,
            operator.add,
            operator.mul,
        ):
            return f"`{target}` cannot be outlined"
    found = wire(runs)
    if isinstance(found, str):
        return found
    if _aliases(runs[0], found.outputs):
        return "a layer returns a view of something else that it returns or reads"
    layouts = [{_layout(node.meta.get("val")) for node in column} for column in found.inputs]
    if any(len(kinds) != 1 for kinds in layouts):
        return "the repetitions read inputs of different layout"
    if any(_layout(node.meta.get("val")) in ("SymFloat", "SymBool") for column in found.inputs for node in column):
        return "a layer reads a symbolic float"
    if any(_data_dependent(node.meta.get("val")) for node in runs[0]):
        return "a layer works on rows whose number is only known at run time"
    return found


def _data_dependent(value: Any) -> bool:
    """Tell whether a size is unbacked; `invoke_subgraph` cannot retrace those (torch 2.13)."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return isinstance(value, torch.Tensor) and bool(free_unbacked_symbols(value))


def _aliases(run: Sequence[fx.Node], outputs: Sequence[int]) -> bool:
    inside = set(run)
    roots: list[fx.Node] = []
    for number in outputs:
        node = run[number]
        while isinstance(node.target, torch._ops.OpOverload) and _may_alias(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
            if node not in inside:
                return True
        roots.append(node)
    return len(set(roots)) != len(roots)


def _may_alias(node: fx.Node) -> bool:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    name = target._schema.name
    return target.is_view or name in ("aten::reshape", "aten::to", "aten::contiguous", "aten::flatten", "aten::detach")


# --- rewriting -------------------------------------------------------------------------------------------------------------


def _build(module: fx.GraphModule, runs: Sequence[Sequence[fx.Node]], inputs: Columns, outputs: Sequence[int]) -> None:
    graph = module.graph
    body = _body(runs[0], inputs, outputs)
    name = "eff_layer"
    module.add_submodule(name, body)
    with graph.inserting_before(runs[0][0]):
        handle = graph.get_attr(name)
    values = [runs[0][number].meta["val"] for number in outputs]
    replaced: dict[fx.Node, fx.Node] = {}
    for index, run in enumerate(runs):
        with graph.inserting_before(run[0]):
            operands = [replaced.get(column[index], column[index]) for column in inputs]
            call = graph.call_function(torch.ops.higher_order.invoke_subgraph, (handle, name, *operands))
            call.meta["val"] = tuple(run[number].meta["val"] for number in outputs)
            copy_meta(run[0], call)
            for position, number in enumerate(outputs):
                item = graph.call_function(operator.getitem, (call, position))
                item.meta["val"] = values[position] if index == 0 else run[number].meta["val"]
                copy_meta(run[number], item)
                replaced[run[number]] = item
    inside = {node for run in runs for node in run}
    for run in runs:
        for number in outputs:
            old = run[number]
            old.replace_all_uses_with(replaced[old], delete_user_cb=lambda user: user not in inside)
    for run in reversed(runs):
        for node in reversed(run):
            graph.erase_node(node)


def _body(run: Sequence[fx.Node], inputs: Columns, outputs: Sequence[int]) -> fx.GraphModule:
    graph = fx.Graph()
    seen: dict[fx.Node, fx.Node] = {}
    for number, column in enumerate(inputs):
        copy = graph.placeholder(f"x{number}")
        copy.meta = {"val": column[0].meta["val"]}
        seen[column[0]] = copy
    for node in run:
        seen[node] = graph.node_copy(node, lambda old: seen[old])
    graph.output(tuple(seen[run[number]] for number in outputs))
    return fx.GraphModule(torch.nn.Module(), graph)
