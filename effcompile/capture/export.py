"""Capture an ExportedProgram: the same pre-dispatch ATen that the Dynamo path yields, with parameters named by the exporter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind as SpecKind
from torch.export.graph_signature import InputSpec, TensorArgument

from effcompile.capture.dynamo import source_line
from effcompile.core.program import Entry, Input, InputKind, Program


def capture_export(exported: torch.export.ExportedProgram, name: str = "forward") -> Program:
    """Return the program of an exported model, symbolic sizes and buffer writes kept.

    The exported program is not changed. Inputs keep the exporter's order: parameters, buffers, constants, then the user's.
    """
    source = exported.graph_module
    graph, seen = fx.Graph(), dict[fx.Node, fx.Node]()
    result = graph.graph_copy(source.graph, seen)
    graph.output(result)
    for old, new in seen.items():
        new.meta = dict(old.meta)
        if line := source_line(old):
            new.meta["eff.source"] = line
    module = fx.GraphModule(source, graph)
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs if hasattr(spec.arg, "name")}
    values: dict[str, Any] = {**exported.state_dict, **exported.constants}
    inputs = []
    for node in graph.nodes:
        if node.op == "placeholder":
            spec = specs.get(node.name)
            target = str(spec.target) if spec is not None and spec.target else node.name
            inputs.append(Input(node.name, _kind(node, spec), target, values.get(target)))
    training = torch.is_grad_enabled() and any(p.requires_grad for p in exported.parameters())
    first = next((n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)), None)
    device = "cpu" if first is None else first.device.type
    return Program((Entry(name, module, tuple(inputs)),), "export", (), training, device)


def restore_export(exported: torch.export.ExportedProgram, program: Program) -> torch.export.ExportedProgram:
    """Return the exported program with its graph replaced by that of a program that `capture_export` made of it.

    The inputs must be the same, in the same order, but for constants of kind `packed`; outputs may be computed by other nodes.
    """
    entry, signature = program.entries[0], exported.graph_signature
    graph, left, constants = entry.graph, list(signature.input_specs), dict(exported.constants)
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    assert len(inputs) == len(entry.inputs), "a rewrite changed the inputs of an exported program"
    taken = []
    for node, given in zip(inputs, entry.inputs):
        if given.kind == "packed":
            constants[given.name] = given.value
            taken.append(InputSpec(SpecKind.CONSTANT_TENSOR, TensorArgument(node.name), given.name))
            continue
        taken.append(left.pop(0))
        name = taken[-1].arg.name
        assert node.name in (given.node, name), "a rewrite changed the inputs of an exported program"
        node.name = node.target = name  # copying a graph renames what is called as a function of Python is: `input`
    assert not left, "a rewrite changed the inputs of an exported program"
    outputs = next(iter(graph.graph.find_nodes(op="output"))).args[0]
    specs = [
        replace(spec, arg=replace(spec.arg, name=node.name))
        if isinstance(node, fx.Node) and hasattr(spec.arg, "name")
        else spec
        for spec, node in zip(signature.output_specs, outputs, strict=True)
    ]
    return torch.export.ExportedProgram(
        root=graph,
        graph=graph.graph,
        graph_signature=replace(signature, input_specs=taken, output_specs=specs),
        state_dict=exported.state_dict,
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=constants,
        verifiers=exported.verifiers,
    )


def _kind(node: fx.Node, spec: Any) -> InputKind:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return "size"
    kind = str(getattr(getattr(spec, "kind", None), "name", ""))
    if kind == "PARAMETER":
        return "parameter"
    return "buffer" if kind in ("BUFFER", "CONSTANT_TENSOR") else "user"
