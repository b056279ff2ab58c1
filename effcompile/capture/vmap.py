"""Write the vmap regions of a Dynamo graph out as the operations that they perform.

Dynamo records `torch.vmap` as calls that raise a nesting level, mark a dimension as the batch, and lower the level again. A second
trace before dispatch sees the operations in between on values without their batch, and loses what connects them to the inputs. So
each outermost region is first traced on its own, below the batching rules, and takes part in the graph as what came out.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from effcompile.core.rewrite import copy_graph

_ENTER, _LEAVE = "_vmap_increment_nesting", "_vmap_decrement_nesting"
_PREPARE = "lazy_load_decompositions"  # says nothing of values; torch 2.11 records it again and again
_TRANSFORMS = ("_grad_increment_nesting", "_jvp_increment_nesting", "_func_increment_nesting")
_REGION = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")


def transform_of(gm: fx.GraphModule) -> str:
    """Return what stands in the way of writing the graph's transforms out, or ''."""
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if _called(node) in _TRANSFORMS:
                return "a derivative is taken inside the model (torch.func)"
            if module is not gm and _called(node) == _ENTER:
                return "a vmap inside a branch or another graph of its own"
    for region in _regions(gm.graph):
        if any(_called(node) in _REGION for node in region):
            return "gradients or autocast change inside a vmap"
        inside = set(region)
        if any(_batched(node) for node in region if any(user not in inside for user in node.users)):
            return "a vmap that does not end in its own graph"
    return ""


def differentiates_vmap(gm: fx.GraphModule) -> bool:
    """Tell whether gradients flow into a vmap: what comes out of a region is recorded below autograd."""
    values = [node.meta.get("example_value") for region in _regions(gm.graph) for node in _read(region)]
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def without_vmap(gm: fx.GraphModule, mode: Any) -> fx.GraphModule:
    """Return the graph, or a copy in which each outermost vmap region is a call of a module of ATen operations.

    `mode` is the fake mode that the whole graph will be traced in; Dynamo's example values belong to one of its own.
    """
    if not _regions(gm.graph):
        return gm
    module = copy_graph(gm)
    for number, region in enumerate(_regions(module.graph)):
        inputs = _read(region)
        inside = set(region)
        outputs = [node for node in region if any(user not in inside for user in node.users)]
        name = f"eff_vmap_{number}"
        module.add_submodule(name, _trace(module, region, inputs, outputs, mode))
        with module.graph.inserting_before(region[0]):
            call = module.graph.call_module(name, tuple(inputs))
            call.meta = {key: value for key, value in region[-1].meta.items() if key != "example_value"}
            for place, old in enumerate(outputs):
                new = module.graph.call_function(operator.getitem, (call, place))
                new.meta = dict(old.meta)
                old.replace_all_uses_with(new, delete_user_cb=lambda user, own=inside: user not in own)
        for node in reversed(region):
            module.graph.erase_node(node)
    for node in [node for node in module.graph.nodes if _called(node) == _PREPARE]:
        module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module


def _called(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _regions(graph: fx.Graph) -> list[list[fx.Node]]:
    """Return the nodes of each outermost region, from the call that raises the level to the one that lowers it again."""
    regions: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        if _called(node) == _ENTER:
            depth += 1
            if depth == 1:
                regions.append([])
        if depth and node.op != "get_attr":
            regions[-1].append(node)
        if _called(node) == _LEAVE:
            depth -= 1
    return regions


def _read(region: Sequence[fx.Node]) -> list[fx.Node]:
    """Return what a region reads from outside, without the modules and constants that it names itself."""
    inside = set(region)
    found = [node for user in region for node in user.all_input_nodes if node not in inside and node.op != "get_attr"]
    return list(dict.fromkeys(found))


def _batched(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def _trace(
    module: fx.GraphModule, region: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], mode: Any
) -> fx.GraphModule:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    for node in dict.fromkeys(n for user in region for n in user.all_input_nodes if n.op == "get_attr"):
        copies[node] = graph.get_attr(str(node.target))
    for node in region:
        copies[node] = graph.node_copy(node, lambda old: copies[old])
    graph.output(tuple(copies[node] for node in outputs))
    part = fx.GraphModule(module, graph)
    with mode:
        values = [_fresh(node.meta["example_value"]) for node in inputs]
        traced = make_fx(fx.Interpreter(part).run, _allow_non_fake_inputs=True)(*values)
    assert isinstance(traced, fx.GraphModule)
    return traced


def _fresh(value: Any) -> Any:
    """Return a value of the same layout in the active fake mode; sizes are Dynamo's own symbols."""
    if not isinstance(value, torch.Tensor):
        return value
    options = {"dtype": value.dtype, "device": value.device, "requires_grad": value.requires_grad}
    return torch.empty_strided(value.shape, value.stride(), **options)  # type: ignore[arg-type]
