"""Engines of TensorRT-RTX without a GPU, and the recipe for TensorRT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import effcompile as eff
from effcompile.cli.models import load_model
from effcompile.codegen.emitters.tensorrt_rtx import TensorRtRtx
from effcompile.core.bundle import read_artifact
from effcompile.core.errors import EffError
from tests.cli.command import run
from tests.integrations.test_prepare import llama

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class Head(nn.Module):
    """One causal attention behind a product."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.take = nn.Linear(64, 64, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over `[B, S, 64]`."""
        q = self.take(x).unflatten(-1, (2, 32)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


def inputs(dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor of a call."""
    return torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(("dtype", "form"), [(torch.float32, "decomposed"), (torch.float16, "fused")])
def test_engines_of_several_chips(dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    chips = ("sm_75," if dtype == torch.float16 else "") + "sm_86,sm_89,sm_120"
    made = eff.export(Head(dtype).eval(), (inputs(dtype),), to="tensorrt-rtx", target=chips, out=tmp_path / "a")
    told = dict(made.details)
    assert told["attention"] == form, told
    native = [name for name, entry in made.files if entry.native]
    assert native == ["engines/sm_75.engine"] * (dtype == torch.float16) + ["engines/sm_86+sm_89+sm_120.engine"]
    assert made.checks
    assert max(check.error for check in made.checks) < (1e-5 if dtype == torch.float32 else 5e-3)
    x = inputs(dtype)[:1, :9]
    with torch.no_grad():
        wanted = Head(dtype).eval()(x)
    found = eff.load(tmp_path / "a")({made.inputs[0].name: x})  # its ONNX, which needs no trust
    torch.testing.assert_close(next(iter(found.values())), wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(EffError, match="EFF-E107"):
        eff.load(tmp_path / "a", provider="tensorrt")
    if not torch.cuda.is_available():
        with pytest.raises(EffError, match="EFF-E165"):
            eff.load(tmp_path / "a", provider="tensorrt", trust=True)
    engine = tmp_path / "a" / native[0]
    engine.write_bytes(engine.read_bytes()[:-100])
    with pytest.raises(EffError, match="EFF-E105"):
        eff.load(tmp_path / "a", provider="tensorrt", trust=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zoo:llama-tiny", "one tensor as q, k and v"])
def test_the_same_bytes_again(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    given = load_model(name, {"batch": 2, "seq": 16}, None, real=True) if name.startswith("zoo:") else None
    files = []
    for place in "abc":
        model, args = (given.model, given.args) if given else (Head(torch.float32).eval(), (inputs(torch.float32),))
        made = eff.export(model, args, to="tensorrt-rtx", target="sm_86,sm_89,sm_120", out=tmp_path / place)
        files.append({file: entry.sha256 for file, entry in made.files})
    assert files[0] == files[1] == files[2]


@pytest.mark.slow
@pytest.mark.parametrize("buffers", [False, True])
def test_a_decoder_with_its_cache(buffers: bool, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = llama(num_hidden_layers=1)
    made = eff.export(model, to="tensorrt-rtx", target="sm_86,sm_120", out=tmp_path / "a", cache=True, buffers=buffers)
    low, _, high = map(json.loads, dict(made.details)["sizes of attention_mask"].split(" to "))
    assert low == ([1, 1] if buffers else [1, 2])  # a first token; without buffers a token behind another
    assert high == [8, 4 * (5 + 4)]
    assert "engines/sm_86+sm_120.engine" in dict(made.files)


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("sm_90", "EFF-E150"),
        ("sm_100", "EFF-E150"),
        ("gfx942", "EFF-E150"),
        ("cpu", "EFF-E150"),
        ("sm_98", "EFF-T101"),
        (None, "EFF-E151"),
        ("sm_89:onnx", "EFF-E151"),
    ],
)
def test_targets_that_are_refused(target: str | None, code: str, tmp_path: Path) -> None:
    with pytest.raises(EffError, match=code) as caught:
        eff.export(Head(torch.float32), (inputs(torch.float32),), to="tensorrt-rtx", target=target, out=tmp_path / "a")
    assert caught.value.hint or "did you mean" in caught.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "code"), [("import os; os.abort()", "EFF-E162"), ("import time; time.sleep(60)", "EFF-E163")]
)
def test_a_builder_that_dies_leaves_nothing(
    program: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(TensorRtRtx, "command", (sys.executable, "-c", program))
    with pytest.raises(EffError, match=code):
        eff.export(
            Head(torch.float32).eval(),
            (inputs(torch.float32),),
            to="tensorrt-rtx",
            target="sm_89",
            out=tmp_path / "a",
            seconds=3,
        )
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_for_tensorrt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = inputs(torch.float32)
    made = eff.export(
        Head(torch.float32).eval(), (x,), to="tensorrt", target="sm_90", out=tmp_path / "a", profile="x.1=1:64:512"
    )
    recipe = json.loads((tmp_path / "a" / "build.json").read_text())
    assert recipe["profiles"] == [{"x": [[1, 1, 64], [2, 64, 64], [8, 512, 64]]}]
    compile((tmp_path / "a" / "build_engine.py").read_text(), "build_engine.py", "exec")
    assert "build_engine.py" in dict(made.details)["engine"]
    assert next(iter(eff.load(tmp_path / "a")({"x": x}).values())).shape == (2, 2, 40, 32)
    with pytest.raises(EffError, match=r"EFF-E167 .*not built"):
        eff.load(tmp_path / "a", provider="tensorrt", trust=True)
    assert run(capsys, "show", str(tmp_path / "a")).code == 0
    (tmp_path / "a" / "model.onnx.data").unlink()
    with pytest.raises(EffError, match="EFF-E105"):
        read_artifact(tmp_path / "a")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("form", "package"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_an_engine_on_its_gpu(form: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    from effcompile.codegen.tensorrt.session import chip_here
    from effcompile.exporting import emitter

    if chip_here() not in emitter(form).targets():
        pytest.skip(f"{form} has no {chip_here()}")
    model, x = Head(torch.float16).eval(), inputs(torch.float16)
    made = eff.export(model, (x,), to=form, target=chip_here(), out=tmp_path / "a")
    found = eff.load(tmp_path / "a", provider="tensorrt", trust=True)({made.inputs[0].name: x[:1, :9]})
    with torch.no_grad():
        torch.testing.assert_close(next(iter(found.values())), model(x[:1, :9]), rtol=2e-2, atol=2e-2)
