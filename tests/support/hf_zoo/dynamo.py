"""Count the graphs and graph breaks that plain Dynamo has for a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tests.support.hf_zoo.matrix import Call, MatrixCase
from tests.support.hf_zoo.run import run_call


def lost_by_dynamo(case: MatrixCase) -> str:
    """Return why this torch's Dynamo cannot trace a case whatever the backend is, or ''."""
    if case.name == "llama-flex" and torch.__version__.startswith("2.11."):
        return "torch 2.11 hands a tensor of the BlockMask over a graph break instead of the BlockMask"
    return ""


@dataclass(frozen=True)
class Trace:
    """Hold what one compiled run gave.

    Attributes:
        outputs: by name, as `run_call` gives them.
        graphs: how often the backend was called.
        breaks: what Dynamo counted; a branch on a tensor's value splits the graph without being counted.
    """

    outputs: dict[str, Tensor]
    graphs: int
    breaks: int


def trace_call(
    module: nn.Module,
    case: MatrixCase,
    call: Call,
    backend: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]] | None = None,
    dynamic: bool | None = None,
) -> Trace:
    """Run `call` through `torch.compile` from a clean Dynamo state.

    Args:
        module: what `case.build()` gave.
        case: where the call comes from.
        call: one of `case.calls`.
        backend: what compiles each graph; absent, the graph runs as Dynamo made it.
        dynamic: as in `torch.compile`.
    """
    graphs = 0

    def counting(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward if backend is None else backend(graph, inputs)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        found = run_call(torch.compile(module, backend=counting, dynamic=dynamic), case, call)
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    finally:
        torch._dynamo.reset()
    return Trace(found, graphs, breaks)
