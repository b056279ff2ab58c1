"""Run one operator alone in ONNX Runtime, and compare it with the torch function that it is to stand for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from effcompile.codegen.onnx.functions import parsed
from effcompile.core.export_form import OWN, Dialect, Placement
from effcompile.core.site import Refusal

CODE = "EFF-E116"
NEAR = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""The largest |difference| over the largest |reference| that an operator may show, by the dtype of its result."""
_TYPES = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int32: 6, torch.int64: 7, torch.bool: 9, torch.float16: 10,
    torch.float64: 11, torch.bfloat16: 16,
}  # fmt: skip
MOST = 1 << 24  # numbers of a sample: a larger one says nothing more


class Probe:
    """Answer for places; equal operators on equal shapes are run once."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._known: dict[str, Refusal | None] = {}

    def __call__(self, placement: Placement) -> Refusal | None:
        """Return why the operator may not stand there, else None."""
        key = _key(placement)
        if key not in self._known:
            self._known[key] = self._tried(placement)
        return self._known[key]

    def _tried(self, placement: Placement) -> Refusal | None:
        given = placement.sample() if placement.sample is not None else _sample(placement)
        if isinstance(given, Refusal):
            return given
        with torch.no_grad():
            wanted = placement.reference(*given)
        exact = list(wanted) if isinstance(wanted, tuple | list) else [wanted]
        try:
            found = _run(placement, given, exact, self._dialect)
        except Exception as error:  # whatever the runtime says, the place stays as it is
            return Refusal(CODE, f"{placement.op} does not run: {' '.join(str(error).split())[-200:]}")
        for value, right in zip(found, exact, strict=True):
            if value.shape != right.shape:
                return Refusal(CODE, f"{placement.op} gives {list(value.shape)}, not {list(right.shape)}")
            scale = right.double().abs().max().clamp_min(1e-30) if right.numel() else torch.ones(())
            apart = float((value.double() - right.double()).abs().max() / scale) if right.numel() else 0.0
            if not apart <= NEAR.get(right.dtype, 0.0):
                return Refusal(CODE, f"{placement.op} is {apart:.1e} away from what it stands for")
        return None


def _key(placement: Placement) -> str:
    shapes = [] if placement.sample is not None else [_described(node) for node in placement.inputs]
    there = [node is None for node in (*placement.inputs, *placement.outputs)]
    told = [placement.op, sorted(placement.attributes.items()), placement.body, shapes, there, placement.shared]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _described(node: fx.Node | None) -> str:
    if node is None:
        return ""
    value = node.meta["val"]
    return f"{value.dtype}{[_hint(size) for size in value.shape]}"


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _sample(placement: Placement) -> tuple[Tensor, ...] | Refusal:
    draw = torch.Generator().manual_seed(0)
    made = []
    for node in placement.inputs:
        if node is None:
            continue
        value = node.meta["val"]
        shape = [_hint(size) for size in value.shape]
        if not value.dtype.is_floating_point:
            return Refusal(CODE, f"{placement.op} takes a {value.dtype} input, for which nothing says what to try")
        if torch.Size(shape).numel() > MOST:
            return Refusal(CODE, f"an input of {placement.op} is too large to try")
        made.append(torch.randn(shape, generator=draw).to(value.dtype))
    return tuple(made)


def _run(placement: Placement, given: Sequence[Tensor], exact: Sequence[Tensor], dialect: Dialect) -> list[Tensor]:
    import onnx
    import onnxruntime
    from onnx import helper

    domain, _, name = placement.op.rpartition("::")
    held = iter(given)
    names, values = [], {}
    for place, node in enumerate(placement.inputs):
        names.append(f"i{place}" if node is not None else "")
        if node is not None:
            values[f"i{place}"] = next(held)
    outputs = [f"o{place}" for place in range(len(exact))]
    made = helper.make_node(name, names, outputs, domain=domain, **dict(placement.attributes))
    graph = helper.make_graph(
        [made],
        "probe",
        [helper.make_tensor_value_info(n, _TYPES[x.dtype], list(x.shape)) for n, x in values.items()],
        [
            helper.make_tensor_value_info(n, _TYPES[x.dtype], [None] * x.dim())
            for n, x in zip(outputs, exact, strict=True)
        ],
    )
    functions = [parsed(placement.body)] if domain == OWN else []
    imports = [helper.make_opsetid("", dialect.opset)]
    if domain:
        imports.append(helper.make_opsetid(domain, 1))
    model = helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {n: _ort(onnxruntime, x) for n, x in values.items()}
    if not placement.shared:
        return [_back(value) for value in session.run_with_ort_values(outputs, feeds)]
    binding, own = session.io_binding(), {f"o{after}": feeds[f"i{before}"] for before, after in placement.shared}
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, value)
    for name in outputs:
        if name in own:
            binding.bind_ortvalue_output(name, own[name])
        else:
            binding.bind_output(name)
    session.run_with_iobinding(binding)
    return [_back(value) for value in binding.get_outputs()]


def _ort(onnxruntime: Any, x: Tensor) -> Any:
    x = x.contiguous()
    if x.dtype == torch.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(x.view(torch.uint16).numpy(), 16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy())


def _back(value: Any) -> Tensor:
    if value.element_type() == 16:
        return torch.from_numpy(value.numpy().copy()).view(torch.bfloat16)
    return torch.from_numpy(value.numpy().copy())
