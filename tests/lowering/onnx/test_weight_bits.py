"""Weights of 4 bits: found where floats lie on a grid, told to the operator, and left alone where one does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import effcompile as eff
from effcompile.lowering.onnx.weight_bits import codes_of

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def grid(kind: str, rows: int = 256, width: int = 256) -> Tensor:
    """Return float32 weights as a file of GGUF gives them back."""
    draw = torch.Generator().manual_seed(0)
    shape = (rows, width // 32)
    steps = (torch.rand(shape, generator=draw) / 50 + 1e-3).half().float()[..., None]
    codes = torch.randint(0, 16, (*shape, 32), generator=draw).float()
    codes[..., 0], codes[..., 1] = 0.0, 15.0 if kind == "q4_1" else 11.0
    if kind == "q4_0":
        return ((codes.clamp(max=11.0) - 8) * steps).flatten(1)
    low = torch.randn(shape, generator=draw).half().float()[..., None] / 10
    return (codes * steps + low).flatten(1)


@pytest.mark.parametrize(("kind", "middle"), [("q4_0", False), ("q4_1", True)])
def test_codes_are_found_again(kind: str, middle: bool) -> None:
    weight = grid(kind)
    codes = codes_of(weight)
    assert codes is not None
    assert (codes.middle is not None) == middle
    numbers = (codes.codes.double() - 8) * codes.steps.double()[..., None]
    if codes.middle is not None:
        numbers = numbers + codes.middle.double()[..., None]
    torch.testing.assert_close(numbers.flatten(1).float(), weight, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1"])
def test_one_number_beside_the_grid(kind: str) -> None:
    weight = grid(kind)
    weight[-1, -1] += 0.01 * float((weight[-1, -32:].max() - weight[-1, -32:].min()) / 15)
    assert codes_of(weight) is None
    assert codes_of(torch.randn(64, 64)) is None
    assert codes_of(torch.randint(-100, 100, (64, 64)) / 50) is None  # a grid of more codes than 16
    assert codes_of(grid(kind)[:, :-1]) is None
    assert codes_of(grid(kind).half()) is None


class Two(nn.Module):
    """Hold a layer on a grid and, behind it, one that is not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.packed, self.plain = nn.Linear(256, 256), nn.Linear(256, 256, bias=False)
        with torch.no_grad():
            self.packed.weight.copy_(grid(kind))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[batch, tokens, 256]`."""
        return self.plain(torch.relu(self.packed(x)))


@pytest.mark.parametrize("kind", ["q4_1", pytest.param("q4_0", marks=pytest.mark.slow)])
def test_a_file_holds_the_codes(kind: str, tmp_path: Path) -> None:
    made = eff.export(Two(kind).eval(), (torch.randn(2, 3, 256),), to="onnx", out=tmp_path / "a", flavor="ort")
    assert dict(made.details)["forms"] == "1 x weight-bits", dict(made.details)
    assert max(check.error for check in made.checks) < 1e-5
    size = sum(entry.bytes for name, entry in made.files if name.startswith("model.onnx"))
    assert size < 1.6 * 4 * 256 * 256  # of both in float32, 2
    plain = eff.export(Two(kind).eval(), (torch.randn(2, 3, 256),), to="onnx", out=tmp_path / "b")
    assert "weight-bits" not in dict(plain.details)["forms"]
