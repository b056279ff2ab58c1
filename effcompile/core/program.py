"""Hold captured graphs: the form that every stage after capture reads and rewrites.

An `Entry` is one pre-dispatch ATen graph (prefill, decode, denoise, or simply `forward`). Its inputs say what each placeholder
is, so that passes can tell a weight from an activation and reports can name it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

InputKind = Literal["user", "parameter", "buffer", "size", "packed"]


@dataclass(frozen=True)
class Input:
    """Describe one placeholder; `name` is the user's (`model.layers.0.mlp.up_proj.weight`), `value` the real one if known."""

    node: str
    kind: InputKind
    name: str
    value: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Entry:
    """Hold one graph and the meaning of its inputs. `meta["val"]` of every node is a fake value."""

    name: str
    graph: fx.GraphModule
    inputs: tuple[Input, ...]

    def input_of(self, node: fx.Node) -> Input | None:
        """Return the description of a placeholder node."""
        return next((item for item in self.inputs if item.node == node.name), None)


@dataclass(frozen=True)
class Break:
    """Describe a graph break: where the user's code left the graph, and the module that it hides."""

    reason: str
    source: str
    module: str = ""


@dataclass(frozen=True)
class Program:
    """Hold the graphs of one capture. `requires_grad` tells whether any input wants a gradient."""

    entries: tuple[Entry, ...]
    origin: Literal["dynamo", "export"] = "dynamo"
    breaks: tuple[Break, ...] = ()
    requires_grad: bool = False
    device: str = "cpu"

    def with_graph(self, entry: Entry, graph: fx.GraphModule) -> Program:
        """Return the program with one entry, known by its name, and its graph replaced."""
        new = replace(entry, graph=graph)
        return replace(self, entries=tuple(new if e.name == entry.name else e for e in self.entries))


def text(program: Program) -> str:
    """Print the program as stable text: ops, operands and shapes, without node names that depend on the tracer."""
    lines = []
    for entry in program.entries:
        lines.append(f"entry {entry.name}")
        numbers: dict[fx.Node, str] = {}
        for node in entry.graph.graph.nodes:
            numbers[node] = f"%{len(numbers)}"
            value = node.meta.get("val")
            shape = f"{_short(value.dtype)}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
            operands = fx.node.map_arg((node.args, node.kwargs), lambda item, of=numbers: _Name(of[item]))
            listed = ", ".join([*map(str, operands[0]), *(f"{k}={v}" for k, v in operands[1].items())])
            target = node.target if node.op == "call_function" else f"{node.op}"
            lines.append(f"  {numbers[node]} = {target}({listed}) {shape}".rstrip())
    return "\n".join(lines)


class _Name(str):
    def __repr__(self) -> str:
        return str(self)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "f").replace("bf", "bf").replace("int", "i")
