"""Choose how a graph becomes a callable: `emit="inductor"` (the default) or `emit="interpreter"`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from effcompile.codegen.inductor import compile_graph
from effcompile.codegen.interpreter import interpret_graph
from effcompile.core.options import Options
from effcompile.ops import native

_NATIVE = ("eff::attention_tiled_v1", "eff::attention_blocks_v1", "eff::attention_tokens_v1")
"""Ops that run the C++ kernels on CPU tensors."""


def emit_graph(graph: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Return a function of the graph's inputs, made as `options.emit`, `mode` and `inductor` say."""
    if any(_name(node) in _NATIVE for module in graph.modules() for node in _nodes(module)):
        native.prefetch()
    if options.emit == "interpreter":
        return interpret_graph(graph)
    return compile_graph(graph, example_inputs, mode=options.mode, patches=dict(options.inductor))


def _nodes(module: Any) -> Sequence[fx.Node]:
    return tuple(module.graph.nodes) if isinstance(module, fx.GraphModule) else ()


def _name(node: fx.Node) -> str:
    return str(node.target._schema.name) if isinstance(node.target, torch._ops.OpOverload) else ""
