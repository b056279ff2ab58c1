"""Run a piece of a graph by itself: what an operator is to stand for, exactly as this graph has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from effcompile.core import compat

Given = Mapping[Any, sympy.Integer]
"""Values of symbols that are not the traced ones."""


class Piece:
    """Hold the nodes between inputs and outputs; `inside` are those that nothing else reads, outputs left out."""

    def __init__(
        self, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], nodes: Sequence[fx.Node], given: Given
    ) -> None:
        self.given = given
        self.inputs, self.outputs, self.nodes = tuple(inputs), tuple(outputs), tuple(nodes)
        own = set(nodes)
        inside = {node for node in nodes if node not in self.outputs}
        while left := {
            node
            for node in inside
            if any(user not in own or _leaves(user, inside, own, self.outputs) for user in node.users)
        }:
            inside -= left
        self.inside = tuple(node for node in nodes if node in inside)

    def __call__(self, *values: Tensor) -> tuple[Any, ...]:
        """Return the outputs; sizes are those that were traced, or given."""
        known: dict[fx.Node, Any] = dict(zip(self.inputs, values, strict=True))

        def value(node: fx.Node) -> Any:
            return known[node] if node in known else hint(node.meta["val"], self.given)

        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return tuple(known[node] for node in self.outputs)


def _leaves(user: fx.Node, inside: set[fx.Node], own: set[fx.Node], outputs: tuple[fx.Node, ...]) -> bool:
    return user in own and user not in inside and user not in outputs


def piece(inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], given: Given = {}) -> Piece | None:  # noqa: B006
    """Return what computes outputs from inputs; None where that reads anything else but sizes."""
    seen, waiting = set[fx.Node](), list(outputs)
    while waiting:
        node = waiting.pop()
        if node in seen or node in inputs or _is_size(node):
            continue
        if node.op != "call_function":
            return None
        seen.add(node)
        waiting.extend(node.all_input_nodes)
    ordered = [node for node in outputs[0].graph.nodes if node in seen]
    return Piece(inputs, outputs, ordered, given)


def sample_of(
    nodes: Sequence[fx.Node], made: Mapping[fx.Node, Callable[[], Tensor]], given: Given
) -> tuple[Tensor, ...]:
    """Return tensors of the traced shapes: random numbers, or what `made` gives for a node."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for node in nodes:
        if node in made:
            found.append(made[node]())
            continue
        value = node.meta["val"]
        shape = [hint(size, given) for size in value.shape]
        if value.dtype.is_floating_point:
            found.append(torch.randn(shape, generator=draw).to(value.dtype))
        else:
            low, high = (0, 256) if value.dtype == torch.uint8 else (-128, 128)
            found.append(torch.randint(low, high, shape, generator=draw).to(value.dtype))
    return tuple(found)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def hint(size: Any, given: Given) -> int:
    """Return the value of a size: that which was traced, with the symbols of `given` replaced."""
    if isinstance(size, int):
        return size
    return compat.size_hint(size.node.shape_env, size.node.expr.xreplace(dict(given)))
