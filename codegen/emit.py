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

_NATIVE = {
    "eff::attention_tiled_v1": (native.BLOCKS,),
    "eff::attention_blocks_v1": (native.BLOCKS,),
    "eff::attention_tokens_v1": (native.PROBES, native.BLOCKS),
    "eff::topk_blocks_v1": (native.PROBES,),
    "eff::antidiagonal_blocks_v1": (native.SCORES,),
    "eff::pooled_blocks_v1": (native.PROBES, native.SCORES),
    "eff::vertical_slash_blocks_v1": (native.PROBES, native.SCORES),
    "eff::pages_v1": (native.PAGES,),
    "eff::moe_v1": (native.EXPERTS,),
    "eff::linear_rows_v1": (native.ROWS,),
}
"""Ops that run C++ kernels on CPU tensors, and the sources of those."""


def emit_graph(graph: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Return a function of the graph's inputs, made as `options.emit`, `mode` and `inductor` say."""
    ops = dict.fromkeys(_name(node) for module in graph.modules() for node in _nodes(module))
    native.prefetch(dict.fromkeys(source for op in ops for source in _NATIVE.get(op, ())))
    if options.emit == "interpreter":
        return interpret_graph(graph)
    return compile_graph(graph, example_inputs, mode=options.mode, patches=dict(options.inductor))


def _nodes(module: Any) -> Sequence[fx.Node]:
    return tuple(module.graph.nodes) if isinstance(module, fx.GraphModule) else ()


def _name(node: fx.Node) -> str:
    return str(node.target._schema.name) if isinstance(node.target, torch._ops.OpOverload) else ""
