"""Find the repeated block of a model in its graph, and call it once per layer instead of repeating it.

A transformer's layers trace to the same run of nodes again and again. The run is found by structure: equal operations, literals,
shapes and strides at equal distances; class names play no part. One layer becomes a sub-graph, each repetition an
`invoke_subgraph` call with that layer's weights, so that TorchInductor lowers and compiles it once, while one `compile_fx` keeps
one cache key. Layers that differ, or that write in place, stay as they are, with the reason.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from effcompile.core import compat
from effcompile.core.plan import Plan
from effcompile.core.program import Entry, Program
from effcompile.core.rewrite import Pass, PassResult, copy_graph, copy_meta

MIN_REPEATS = 3
MIN_NODES = 8


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


@dataclass(frozen=True)
class Block:
    """Hold a repetition: `count` runs of `period` nodes, from `start` on, in the list of computing nodes."""

    start: int
    period: int
    count: int


def outline(entry: Entry) -> tuple[fx.GraphModule | None, str]:
    """Return the outlined copy of an entry's graph, or None, and a note that says what was found."""
    module = copy_graph(entry.graph)
    _hoist_constants(module.graph)
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    block = find_block(nodes)
    if block is None:
        return None, "no repeated layers"
    runs = [nodes[block.start + i * block.period :][: block.period] for i in range(block.count)]
    shape = _shape_of(runs)
    if isinstance(shape, str):
        return None, f"{block.count} repetitions stay: {shape}"
    inputs, outputs = shape
    _build(module, runs, inputs, outputs)
    module.graph.lint()
    module.recompile()
    return module, f"{block.count} layers of {block.period} nodes, {len(inputs)} inputs, {len(outputs)} outputs"


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


def find_block(nodes: Sequence[fx.Node]) -> Block | None:
    """Return the repetition that covers most nodes; among equals the shortest period."""
    numbers: dict[str, int] = {}
    keys = [numbers.setdefault(signature(node), len(numbers)) for node in nodes]
    last: dict[int, int] = {}
    gaps: Counter[int] = Counter()
    for place, key in enumerate(keys):
        if key in last:
            gaps[place - last[key]] += 1
        last[key] = place
    best: tuple[int, int, Block] | None = None
    for period, _ in gaps.most_common(12):
        if period < MIN_NODES:
            continue
        for start, stop in _equal_runs(keys, period):
            count = (stop - start) // period + 1
            if count < MIN_REPEATS:
                continue
            slack = stop - start + period - count * period
            start = _best_cut(nodes, start, slack, period)
            found = (count * period, -period, Block(start, period, count))
            if best is None or found[:2] > best[:2]:
                best = found
    return None if best is None else best[2]


def _equal_runs(keys: Sequence[int], period: int) -> list[tuple[int, int]]:
    """Return the maximal ranges [start, stop) in which each key equals the one a period later."""
    runs: list[tuple[int, int]] = []
    start: int | None = None
    for place in range(len(keys) - period + 1):
        same = place < len(keys) - period and keys[place] == keys[place + period]
        if same and start is None:
            start = place
        elif not same and start is not None:
            runs.append((start, place))
            start = None
    return [run for run in runs if run[1] - run[0] >= period]


def _best_cut(nodes: Sequence[fx.Node], start: int, slack: int, period: int) -> int:
    """Return the start within the slack at which fewest values cross from one repetition to the next."""
    place = {node: number for number, node in enumerate(nodes)}
    far = len(nodes)
    reach = [max((place.get(user, far) for user in node.users), default=-1) for node in nodes]

    def crossing(cut: int) -> int:
        return sum(1 for number in range(max(start, cut - period), cut) if reach[number] >= cut)

    candidates = range(start, start + min(slack, period - 1) + 1)
    return min(candidates, key=lambda first: (crossing(first + period), first))


# --- what a repetition reads and returns ---------------------------------------------------------------------------------

Inputs = list[tuple[fx.Node, ...]]  # one tuple an input: the node that each repetition reads


def _shape_of(runs: Sequence[Sequence[fx.Node]]) -> tuple[Inputs, list[int]] | str:
    """Return inputs and output positions of the repeated run, or why the repetitions are not one function."""
    place = [{node: number for number, node in enumerate(run)} for run in runs]
    inputs: dict[tuple[fx.Node, ...], int] = {}
    outputs: set[int] = set()
    for number, first in enumerate(runs[0]):
        target = first.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            return f"`{target}` writes in place"
        if not isinstance(target, torch._ops.OpOverload) and target not in (
            operator.getitem,
            operator.add,
            operator.mul,
        ):
            return f"`{target}` cannot be outlined"
        operands = [run[number].all_input_nodes for run in runs]
        if len({len(found) for found in operands}) != 1:
            return "the repetitions share operands differently"
        for column in zip(*operands):
            inside = {place[r].get(node) for r, node in enumerate(column)}
            if inside == {None}:
                inputs.setdefault(tuple(column), len(inputs))
            elif len(inside) != 1:
                return "the repetitions are wired differently"
        if any(user not in place[r] for r, run in enumerate(runs) for user in run[number].users):
            outputs.add(number)
    for run in runs[1:]:
        if any(not _same_wiring(a, b) for a, b in zip(runs[0], run)):
            return "the repetitions order their operands differently"
    if len({column[0] for column in inputs}) != len(inputs):
        return "the repetitions read their inputs in different roles"
    if _aliases(runs[0], sorted(outputs)):
        return "a layer returns a view of something else that it returns or reads"
    layouts = [{_layout(node.meta.get("val")) for node in column} for column in inputs]
    if any(len(found) != 1 for found in layouts):
        return "the repetitions read inputs of different layout"
    if any(_layout(node.meta.get("val")) in ("SymFloat", "SymBool") for column in inputs for node in column):
        return "a layer reads a symbolic float"
    if any(_data_dependent(node.meta.get("val")) for node in runs[0]):
        return "a layer works on rows whose number is only known at run time"
    return list(inputs), sorted(outputs)


def _data_dependent(value: Any) -> bool:
    """Tell whether a size is unbacked; `invoke_subgraph` cannot retrace those (torch 2.13)."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return isinstance(value, torch.Tensor) and bool(free_unbacked_symbols(value))


def _same_wiring(a: fx.Node, b: fx.Node) -> bool:
    """Tell whether equal operands of one node are equal operands of the other."""
    first, second = _operands(a), _operands(b)
    if len(first) != len(second):
        return False
    renamed: dict[fx.Node, fx.Node] = {}
    return all(renamed.setdefault(x, y) is y for x, y in zip(first, second))


def _operands(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda arg: found.append(arg) or arg)  # type: ignore[func-returns-value]
    return found


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


def _build(module: fx.GraphModule, runs: Sequence[Sequence[fx.Node]], inputs: Inputs, outputs: Sequence[int]) -> None:
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


def _body(run: Sequence[fx.Node], inputs: Inputs, outputs: Sequence[int]) -> fx.GraphModule:
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
