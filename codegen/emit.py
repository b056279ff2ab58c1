"""Choose how a graph becomes a callable: `emit="inductor"` (the default) or `emit="interpreter"`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from effcompile.codegen.inductor import compile_graph
from effcompile.codegen.interpreter import interpret_graph
from effcompile.core.options import Options


def emit_graph(graph: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Return a function of the graph's inputs, made as `options.emit`, `mode` and `inductor` say."""
    if options.emit == "interpreter":
        return interpret_graph(graph)
    return compile_graph(graph, example_inputs, mode=options.mode, patches=dict(options.inductor))
