"""Export to ONNX: every site accounted for, ONNX Runtime equal to eager at sizes that were not traced, the same bytes again."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import effcompile as eff
from effcompile import export_checks
from effcompile.cli.models import load_model
from effcompile.codegen.emitters.onnx import Onnx
from effcompile.core.bundle import read_artifact
from effcompile.core.errors import EffError
from effcompile.exporting import second_opinion
from tests.cli.command import run

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(
    ("name", "opset", "operator", "sites"),
    [
        ("zoo:llama-tiny", 20, "Softmax", 2),
        ("zoo:llama-tiny", 23, "Attention", 2),
        ("zoo:encoder-tiny", 20, "Softmax", 2),
        pytest.param("zoo:vit-tiny", 20, "Softmax", 2, marks=pytest.mark.slow),
        # Its two sides are held to each other: only the batch varies alone.
        pytest.param("zoo:dit-tiny", 20, "Softmax", 2, marks=pytest.mark.slow),
        pytest.param("zoo:seq2seq-tiny", 20, "Softmax", 6, marks=pytest.mark.slow),
        pytest.param("zoo:mixtral-tiny", 20, "Softmax", 4, marks=pytest.mark.slow),
        pytest.param("zoo:nanogpt-tiny", 20, "Softmax", 2, marks=pytest.mark.slow),
    ],
)
def test_models_of_the_zoo(name: str, opset: int, operator: str, sites: int, tmp_path: Path) -> None:
    import onnx

    given = load_model(name, {"batch": 2, "seq": 16}, None, real=True)
    made = eff.export(given.model, given.args, given.kwargs, to="onnx", out=tmp_path / "a", opset=opset, name=name)
    assert [site.status for site in made.sites].count("same") >= sites
    assert not any(site.status == "dropped" for site in made.sites)
    assert max(check.error for check in made.checks) < 1e-5
    free = {size for tensor in made.inputs for size in tensor.shape if isinstance(size, str)}
    assert len({check.sizes for check in made.checks}) == 1 + (1 if name == "zoo:dit-tiny" else len(free))
    with read_artifact(tmp_path / "a") as found:
        graph = onnx.load(str(found.file("model.onnx"))).graph
        assert operator in {node.op_type for node in graph.node}
        assert {node.domain for node in graph.node} <= {""}
        assert str(Path(eff.__file__).parents[1]) not in found.file("model.onnx").read_bytes().decode("latin-1")
    assert bool(dict(made.details)["checked at one value"]) == (name == "zoo:dit-tiny")
    # Sizes that neither the trace nor the checks had.
    other = load_model(name, {"batch": 1, "seq": 9}, None, real=True)
    errors = export_checks.compare(eff.load(tmp_path / "a"), given.runnable, other.args, other.kwargs)
    assert max(error for error, _ in errors.values()) < 1e-5


class Head(nn.Module):
    """One attention with a causal mask, and a size that is fixed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


X = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(1))


def test_the_same_bytes_again(tmp_path: Path) -> None:
    files = []
    for place in ("a", "b"):
        made = eff.export(Head().eval(), (X,), to="onnx", out=tmp_path / place)
        files.append(made.files)
    assert files[0] == files[1]
    assert made.inputs[0].shape[2] == 16


def test_a_policy_without_a_form_there_is_an_error(tmp_path: Path) -> None:
    asked = {"attention": "block-topk{density=0.5,block=16,dense_layers=0}"}
    with pytest.raises(EffError, match="EFF-E108"):
        eff.export(Head().eval(), (X,), to="onnx", out=tmp_path / "a", options=asked)
    assert list(tmp_path.iterdir()) == []
    made = eff.export(Head().eval(), (X,), to="onnx", out=tmp_path / "a", options=asked, allow_dropped=True)
    assert [site.status for site in made.sites if site.form.startswith("block-topk")] == ["dropped"]


@pytest.mark.slow
def test_a_dispatch_without_a_form_there_gives_way_to_another(tmp_path: Path) -> None:
    given = load_model("zoo:mixtral-tiny-gathered", {"batch": 2, "seq": 16}, None, real=True)
    options = {"moe": "fused", "require": {"moe": "all"}}
    made = eff.export(given.model, given.args, given.kwargs, to="onnx", out=tmp_path / "a", options=options)
    assert [site.form for site in made.sites if site.status == "substituted"] == ["dense"] * 2


def test_a_plan_made_for_torch_compile(tmp_path: Path) -> None:
    given = load_model("zoo:llama-tiny", {"batch": 2, "seq": 16}, None, real=True)
    plan = eff.explain(given.model, *given.args, target="cpu").plan
    kernel = next(c for c in plan.graphs[0].choices if c.site)
    other = plan.with_choice(replace(kernel, policy="tiled"))
    made = eff.export(given.model, given.args, to="onnx", out=tmp_path / "a", options={"plan": other})
    told = [(site.status, site.reason) for site in made.sites if site.site == kernel.site]
    assert [status for status, _ in told] == ["substituted"]
    assert "the plan has tiled" in told[0][1]
    with pytest.raises(EffError, match="EFF-E120"):
        eff.export(Head().eval(), (X,), to="onnx", out=tmp_path / "b", options={"plan": other})


def test_a_missing_package_is_named_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Onnx, "needs", ("onnx", "onnx_that_is_not_there"))
    with pytest.raises(EffError, match=r"EFF-E112 .*onnx_that_is_not_there"):
        eff.export(Head().eval(), (X,), to="onnx", out=tmp_path / "a")


def test_other_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_checks, "LIMITS", {torch.float32: 0.0})
    with pytest.raises(EffError, match="EFF-E110"):
        eff.export(Head().eval(), (X,), to="onnx", out=tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_said(tmp_path: Path) -> None:
    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    for code, model, more in [
        ("EFF-E113", Head(), {"to": "onx"}),
        ("EFF-E113", Head(), {"opset": 12}),
        ("EFF-T101", Head(), {"target": "sm_8"}),
        ("EFF-E151", Head(), {"target": "sm_80:tensorrt-rtx"}),
        ("EFF-E114", Breaks(), {}),
    ]:
        with pytest.raises(EffError, match=code):
            eff.export(model.eval(), (X,), **{"to": "onnx", "out": tmp_path / "a", **more})


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "a.zip")
    told = json.loads(run(capsys, "export", "zoo:llama-tiny", "-o", out, "--json").out)
    assert told["form"] == "onnx"
    assert run(capsys, "export", "zoo:llama-tiny", "-o", out).code == 2
    assert "layers.0.attn" in run(capsys, "show", out).out
    assert run(capsys, "verify", out).code == 0
    checked = json.loads(run(capsys, "verify", out, "--model", "zoo:llama-tiny", "--shape", "b=3,s=21", "--json").out)
    assert checked["ok"]
    assert run(capsys, "verify", out, "--model", "zoo:encoder-tiny").code == 2
    numpy.savez(tmp_path / "x.npz", tokens=numpy.arange(30, dtype=numpy.int64).reshape(2, 15))
    assert run(capsys, "run", out, "--input", str(tmp_path / "x.npz"), "-o", str(tmp_path / "y.npz")).code == 0
    assert next(iter(numpy.load(tmp_path / "y.npz").values())).shape == (2, 15, 256)
    numpy.savez(tmp_path / "x.npz", ids=numpy.zeros((2, 3), dtype=numpy.int64))
    assert "EFF-E111" in run(capsys, "run", out, "--input", str(tmp_path / "x.npz")).err


def test_a_second_opinion(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    eff.export(nn.Linear(4, 3).eval(), (torch.randn(2, 4),), to="onnx", out=tmp_path / "a")
    assert "EFF-E175" in run(capsys, "verify", str(tmp_path / "a"), "--polygraphy").err
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "polygraphy.backend.onnxrt", None)
        with pytest.raises(EffError, match="EFF-E175"):
            second_opinion(tmp_path / "a")
    pytest.importorskip("polygraphy")
    runner = second_opinion(tmp_path / "a")
    x = torch.randn(5, 4)
    found = runner({runner.inputs[0]: x})[runner.outputs[0]]
    wanted = eff.load(tmp_path / "a")({runner.inputs[0]: x})[runner.outputs[0]]
    torch.testing.assert_close(found, wanted)
    with pytest.raises(EffError, match="EFF-E111"):
        runner({"other": x})
