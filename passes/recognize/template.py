"""Find in a graph what a function computes, operation by operation: for layers whose spelling is one known model's.

The function is traced on the values that the graph has, and both are compared backwards from a result. Nothing is understood:
another order of operands or another constant is no match. What is found is therefore exactly what the function says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from effcompile.core.plan import Plan
from effcompile.core.program import Entry, Program
from effcompile.core.rewrite import fake_mode_of
from effcompile.passes.canonicalize import RemoveIdentities
from effcompile.passes.recognize.elements import is_write
from effcompile.passes.recognize.match import same_size


@dataclass(frozen=True)
class Template:
    """Hold a traced function: its inputs, and the nodes of what it returns, of which the first is what is looked for."""

    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


Found = Mapping[fx.Node, fx.Node]
"""From the nodes of a template to those of the graph."""


def template(function: Callable[..., Any], *operands: fx.Node) -> Template:
    """Trace a function of tensors and symbolic numbers on the fake values of nodes, in the form that a captured graph has."""
    with fake_mode_of(operands[0].graph) or nullcontext():
        # One node may stand for two operands; the tracer tells operands apart by their identity.
        values = [node.meta["val"] for node in operands]
        module = make_fx(function, pre_dispatch=True)(
            *(value.detach() if isinstance(value, torch.Tensor) else value for value in values)
        )
    program = Program((Entry("template", module, ()),))
    graph = RemoveIdentities().run(program, Plan.single("cpu")).program.entries[0].graph.graph
    inputs = tuple(node for node in graph.nodes if node.op == "placeholder")
    (returned,) = next(node for node in graph.nodes if node.op == "output").args
    return Template(inputs, tuple(returned) if isinstance(returned, tuple | list) else (returned,))


def match(wanted: Template, result: fx.Node) -> Found | None:
    """Return what each node of a template is where `result` is its first output, or None."""
    found: dict[fx.Node, fx.Node] = {}
    waiting: list[tuple[Any, Any]] = [(wanted.outputs[0], result)]
    while waiting:
        mine, other = waiting.pop()
        if _is_size(mine) or _is_size(other):
            # How a size was come by does not matter, and differs: the graph has it from an input.
            if not _equal(mine, other):
                return None
        elif isinstance(mine, fx.Node) and isinstance(other, fx.Node):
            if mine in found:
                if found[mine] is not other:
                    return None
                continue
            if not _alike(mine, other):
                return None
            found[mine] = other
            if mine.op == "placeholder":
                continue
            if mine.target != other.target or set(mine.kwargs) != set(other.kwargs):
                return None
            waiting += [(mine.args, other.args), *((mine.kwargs[key], other.kwargs[key]) for key in mine.kwargs)]
        elif isinstance(mine, list | tuple) and isinstance(other, list | tuple):
            if len(mine) != len(other):
                return None
            waiting += list(zip(mine, other))
        elif not _equal(mine, other):
            return None
    return found


def written_between(found: Found) -> bool:
    """Tell whether anything in the graph writes in place: what is read later might not be what was matched."""
    (graph,) = {node.graph for node in found.values()}
    return any(is_write(node) for node in graph.nodes)


def inputs_of(wanted: Template, found: Found) -> Sequence[fx.Node]:
    """Return the nodes of the graph that a template's inputs are; the template must read all of them."""
    return [found[node] for node in wanted.inputs]


def _alike(mine: fx.Node, other: fx.Node) -> bool:
    """Tell whether two nodes have values of one kind, shape, dtype and device."""
    a, b = mine.meta.get("val"), other.meta.get("val")
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        shapes = len(a.shape) == len(b.shape) and all(map(same_size, a.shape, b.shape))
        return shapes and a.dtype == b.dtype and a.device == b.device
    return type(a) is type(b)


def _is_size(item: Any) -> bool:
    return isinstance(item, fx.Node) and isinstance(item.meta.get("val"), torch.SymInt)


def _equal(mine: Any, other: Any) -> bool:
    """Tell whether two constants agree, where sizes may be numbers in one graph and nodes in the other."""
    mine, other = (item.meta.get("val") if isinstance(item, fx.Node) else item for item in (mine, other))
    if isinstance(mine, torch.SymInt) or isinstance(other, torch.SymInt):
        both = all(isinstance(item, int | torch.SymInt) for item in (mine, other))
        return both and same_size(mine, other)
    return type(mine) is type(other) and bool(mine == other)
