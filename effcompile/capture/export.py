"""Capture an ExportedProgram: the same pre-dispatch ATen that the Dynamo path yields, with parameters named by the exporter."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

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


def _kind(node: fx.Node, spec: Any) -> InputKind:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return "size"
    kind = str(getattr(getattr(spec, "kind", None), "name", ""))
    if kind == "PARAMETER":
        return "parameter"
    return "buffer" if kind in ("BUFFER", "CONSTANT_TENSOR") else "user"
