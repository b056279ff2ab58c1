"""Capture the graph that Dynamo gives to a backend.

The graph is traced once more into pre-dispatch ATen, on Dynamo's own fake tensors, so that symbols stay Dynamo's. The module
that Dynamo gave is never touched. A graph with a higher-order op that no gradient test covers is not retraced while training:
a retraced custom autograd.Function gives wrong gradients without a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from effcompile.capture.retrace import retrace
from effcompile.capture.vmap import differentiates_vmap, transform_of, without_vmap
from effcompile.core import compat
from effcompile.core.errors import EffError
from effcompile.core.program import Break, Entry, Input, InputKind, Program

# Higher-order ops that a gradient test in tests/e2e/test_training.py covers (DESIGN section 1).
DIFFERENTIABLE_HIGHER_ORDER = frozenset({"cond"})
_CARRIED = ("example_value", "grapharg", "tensor_dict", "eff.static")


class CaptureRefused(EffError):
    """Say why a graph goes to TorchInductor as it is."""


def capture_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Program:
    """Return the program of one Dynamo graph; raise `CaptureRefused` where a retrace could change gradients."""
    training = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)
    _refuse_subclasses(gm, example_inputs)
    _refuse_autocast(gm)
    _refuse_transforms(gm, training)
    if training:
        _refuse_higher_order(gm)
    mode = compat.dynamo_fake_mode()
    if mode is None:
        raise CaptureRefused(
            "EFF-G302", "called outside a Dynamo compilation", hint='use torch.compile(model, backend="eff")'
        )
    fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in example_inputs]
    plain = without_vmap(gm, mode)
    with mode:
        traced = retrace(plain, fakes, copying=not training)
    traced.meta = dict(gm.meta)
    old = [node for node in gm.graph.nodes if node.op == "placeholder"]
    new = [node for node in traced.graph.nodes if node.op == "placeholder"]
    assert len(old) == len(new) == len(example_inputs)
    inputs = []
    for before, after, value in zip(old, new, example_inputs):
        for key in _CARRIED:
            if key in before.meta:
                after.meta[key] = before.meta[key]
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
        inputs.append(Input(after.name, _kind(before, value), _input_name(before), value))
    _mark_sources(traced.graph)
    if hasattr(gm, "_param_name_to_source"):
        traced._param_name_to_source = gm._param_name_to_source
    device = next((x.device.type for x in example_inputs if isinstance(x, torch.Tensor)), "cpu")
    entry = Entry("forward", traced, tuple(inputs))
    return Program((entry,), "dynamo", _breaks(gm), training, device)


def _refuse_autocast(gm: fx.GraphModule) -> None:
    """Refuse a graph that changes autocast inside: a retrace records its dtypes as if it did not."""
    for node in gm.graph.nodes:
        if getattr(node.target, "__name__", "") == "_enter_autocast":
            kind, _, enabled = node.args[:3]
            if enabled != torch.is_autocast_enabled(kind) or enabled:
                raise CaptureRefused(
                    "EFF-G305",
                    "the model turns autocast on or off itself",
                    source=source_line(node),
                    hint="put the autocast region around the call of the compiled model",
                )


def _refuse_higher_order(gm: fx.GraphModule) -> None:
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op == "call_function" and isinstance(node.target, compat.higher_order_ops()):
                name = str(getattr(node.target, "_name", node.target))
                if name not in DIFFERENTIABLE_HIGHER_ORDER:
                    raise CaptureRefused(
                        "EFF-G303",
                        f"training through `{name}`: a retrace of it is not known to keep gradients",
                        source=source_line(node),
                        hint="TorchInductor compiles this graph unchanged; run inference under torch.no_grad()",
                    )


def _refuse_transforms(gm: fx.GraphModule, training: bool) -> None:
    """Refuse what a trace before dispatch cannot see through: torch.func, except for vmap of what needs no gradient."""
    reason = transform_of(gm)
    if not reason and training and differentiates_vmap(gm):
        reason = "training through a vmap: a retrace of it is not known to keep gradients"
    if reason:
        raise CaptureRefused("EFF-G306", reason, hint="the graph goes to TorchInductor unchanged")


def _refuse_subclasses(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    plain = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    for value in example_inputs:
        if (
            isinstance(value, torch.Tensor)
            and type(value) not in plain
            and not isinstance(value, torch._subclasses.FakeTensor)
        ):
            raise CaptureRefused(
                "EFF-G304",
                f"an input is a {type(value).__module__}.{type(value).__name__} (tensor subclass)",
                hint="the graph goes to TorchInductor unchanged",
            )


def _kind(node: fx.Node, value: Any) -> InputKind:
    if not isinstance(value, torch.Tensor):
        return "size"
    if isinstance(value, torch.nn.Parameter):
        return "parameter"
    static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    return "buffer" if static else "user"


def _input_name(node: fx.Node) -> str:
    return module_path(_source_name(node)) or node.name


def _source_name(node: fx.Node) -> str:
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return ""
    return source.name if isinstance(source.name, str) else str(source.name())


def in_module(node: fx.Node) -> bool:
    """Tell whether an input is registered as a buffer of a module, and not held by an object that the module was given."""
    return "_buffers[" in _source_name(node)


def module_path(source: str) -> str:
    """Turn Dynamo's spelling of a source into a dotted path: `L['self']._modules['a']._parameters['w']` is `a.w`."""
    path = re.sub(r"^[LG]\['?(\w+)'?\]", r"\1", source)
    path = re.sub(r"\._(?:modules|parameters|buffers)\b", "", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    path = re.sub(r"\b__dict__\._(?:modules|parameters|buffers)\.", "", path)  # a module whose __getattr__ is its own
    return re.sub(r"^(?:self|fn)\.", "", path)


def _mark_sources(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if line := source_line(node):
            node.meta["eff.source"] = line


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


_PACKAGE = Path(__file__).resolve().parents[1]
_OWN = tuple(f"{_PACKAGE / folder}/" for folder in ("ops", "runtime", "integrations"))
"""What a prepared model calls of ours, in the user's name."""


def source_line(node: fx.Node) -> str:
    """Return the innermost `file:line` of the user's code that made the node, or ''."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    outside = [frame for frame in frames if "/torch/" not in frame[0] and not frame[0].startswith(_OWN)]
    chosen = (outside or frames)[-1:] or [("", "")]
    return f"{chosen[0][0]}:{chosen[0][1]}" if chosen[0][0] else ""


def module_of(node: fx.Node) -> str:
    """Return the dotted path of the innermost module that made the node, or ''."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        if isinstance(path, str) and path:
            return module_path(path)
    return ""


def _breaks(gm: fx.GraphModule) -> tuple[Break, ...]:
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return ()
    frames = list(reason.user_stack or ())
    source = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return (Break(str(reason.reason).splitlines()[0], source),)
