"""Experts of few bits: found where floats lie on a grid, right in the operator, and left alone where one number does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import effcompile as eff
from effcompile.cli.models import load_model
from effcompile.codegen.onnx.probe import Probe
from effcompile.lowering.onnx.grid import grid_of, packed
from effcompile.lowering.onnx.moe_bits import QuantizedExperts
from tests.lowering.onnx.test_forms import ORT, PORTABLE, places

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def quantized(kind: str, *shape: int, seed: int = 0) -> Tensor:
    """Return float32 weights `[..., in]` as a quantizer gives them back."""
    draw = torch.Generator().manual_seed(seed)
    bits, block = {"q4": (4, 32), "awq": (4, 128), "row4": (4, shape[-1]), "row8": (8, shape[-1]), "q8": (8, 32)}[kind]
    half, top = 1 << (bits - 1), (1 << bits) - 1
    groups = (*shape[:-1], shape[-1] // block)
    steps = torch.rand(groups, generator=draw)[..., None] / 50 + 1e-3
    codes = torch.randint(0, top + 1, (*groups, block), generator=draw)
    codes[..., 0], codes[..., 1] = 1, top  # so that a largest magnitude is what quantizers leave
    zeros = torch.randint(3, top - 3, groups, generator=draw)[..., None] if kind == "awq" else half
    return ((codes - zeros) * steps).flatten(-2)


@pytest.mark.parametrize(
    ("kind", "bits", "block"), [("q4", 4, 32), ("awq", 4, 128), ("row4", 4, 256), ("row8", 8, 256)]
)
def test_codes_are_found_again(kind: str, bits: int, block: int) -> None:
    weight = quantized(kind, 3, 5, 256)
    weight[1, 2, :block] = 0
    found = grid_of(weight, bits, block)
    assert found is not None
    torch.testing.assert_close(found.numbers().float(), weight, rtol=2e-6, atol=1e-8)
    assert found.plain == (kind != "awq")
    assert int(found.codes.max()) < 1 << bits
    weight[2, 4, -1] += 0.01 * float(found.steps[2, 4, -1])
    assert grid_of(weight, bits, block) is None


def test_what_is_on_no_grid() -> None:
    draw = torch.Generator().manual_seed(0)
    assert grid_of(torch.randn(4, 64, generator=draw), 4, 32) is None
    assert grid_of(quantized("row8", 4, 64), 4, 32) is None
    assert grid_of(quantized("q4", 4, 64).half(), 4, 32) is None
    assert grid_of(quantized("q4", 4, 64), 4, 48) is None
    assert grid_of(quantized("q4", 4, 64) + 0.3, 4, 32) is None  # Q4_1: the lowest value is no whole number of steps


def test_bytes_of_odd_codes() -> None:
    assert packed(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]


def layer(kind: str, layout: str, transposed: bool, bias: bool, act: str = "silu", more: Any = (1.0, 0.0, 0.0)) -> Any:
    """Return a function and operands of a mixture of experts on a grid."""
    draw = torch.Generator().manual_seed(3)
    count, width = 4, 256
    wide = width if layout == "none" else 2 * width
    w1, w2 = quantized(kind, count, wide, width), quantized(kind, count, width, width, seed=1)
    if transposed:
        w1, w2 = w1.mT.contiguous(), w2.mT.contiguous()
    biases = [torch.randn(count, n, generator=draw) for n in (wide, width)] if bias else []
    ids = torch.stack([torch.randperm(count, generator=draw)[:2] for _ in range(6)])
    given = (torch.randn(6, width, generator=draw), ids, torch.rand(6, 2, generator=draw), w1, w2, *biases)

    def function(x: Tensor, ids: Tensor, share: Tensor, w1: Tensor, w2: Tensor, *b: Tensor) -> Tensor:
        b1, b2 = b or (None, None)
        return torch.ops.eff.moe_v1(x, ids, share, w1, b1, w2, b2, act, layout, transposed, "out", *more)

    return function, given


def found(kind: str, *gate: Any, dialect: Any = ORT) -> list[Any]:
    function, given = layer(kind, *gate)
    return places(QuantizedExperts(), dialect, function, *given, known=(3, 4))


@pytest.mark.parametrize(
    ("kind", "gate"),
    [
        ("q4", ("concat", False, False)),
        ("q4", ("interleaved", True, True, "silu", (1.702, 1.0, 7.0))),
        ("awq", ("concat", True, True)),
        ("row4", ("none", False, True, "relu")),
        ("row8", ("concat", False, True)),
    ],
)
def test_the_operator_gives_what_the_codes_mean(kind: str, gate: Any) -> None:
    (place,) = found(kind, *gate)
    assert Probe(ORT)(place) is None
    assert place.attributes["expert_weight_bits"] == (8 if kind == "row8" else 4)
    assert place.attributes.get("block_size") == {"q4": 32, "awq": 128}.get(kind)
    wrong = replace(place, attributes={**place.attributes, "k": 1})
    assert Probe(ORT)(wrong) is not None


def test_what_is_left_alone() -> None:
    assert found("q4", "concat", False, False, dialect=PORTABLE) == []
    assert found("q4", "concat", False, False, "gelu_tanh") == []
    assert found("q8", "concat", False, False) == []  # the operator would round activations


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["q4", "row8"])
def test_a_model_with_such_experts(kind: str, tmp_path: Path) -> None:
    given = load_model("zoo:mixtral-tiny-gathered", {"batch": 2, "seq": 16}, None, real=True)
    with torch.no_grad():
        for module in given.model.modules():
            if hasattr(module, "gate_up"):
                module.gate_up.copy_(quantized(kind, *module.gate_up.shape))
                module.down.copy_(quantized(kind, *module.down.shape))
    made = eff.export(given.model, given.args, to="onnx", out=tmp_path / "a", flavor="ort")
    told = dict(made.details)
    assert "2 x moe-bits" in told["forms"], told
    assert max(check.error for check in made.checks) < 1e-5
    plain = eff.export(given.model, given.args, to="onnx", out=tmp_path / "b")
    sizes = [sum(e.bytes for name, e in m.files if name.startswith("model.onnx")) for m in (made, plain)]
    experts = sum(p.numel() for name, p in given.model.named_parameters() if "gate_up" in name or "down" in name)
    assert sizes[1] - sizes[0] > (4 - (0.75 if kind == "q4" else 1.3)) * experts
