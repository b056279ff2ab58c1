"""Check that shortened programs hold standard operators with static counts, and that ONNX Runtime gives their numbers."""

import pytest
import torch

import effcompile as eff
from effcompile.exporting import load
from effcompile.models import zoo
from tests.passes.tokens.test_drop import compiled, tokens_of, tower

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")


def operators(folder):
    graph = onnx.load(folder / "model.onnx").graph
    return {node.op_type for node in graph.node} | {node.domain for node in graph.node if node.domain}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("policy", ["tome{ratio=0.5}", "spatten{keep=0.6}"])
def test_image_encoder(tmp_path, policy):
    loaded = zoo.load("vit-tiny")
    args, _ = loaded.example_inputs(2)
    options = {"tokens": policy}
    with pytest.raises(Exception, match="EFF-R102"):  # sizes of the image that vary make the number of tokens a symbol
        eff.export(loaded.model, args, to="onnx", out=tmp_path / "out", options=options)
    manifest = eff.export(loaded.model, args, to="onnx", out=tmp_path / "out", options=options, dynamic=False)
    assert any(site.form.startswith(policy.split("{")[0]) for site in manifest.sites)
    assert "TopK" in operators(tmp_path / "out")
    session = load(tmp_path / "out")
    (found,) = session(dict(zip(session.inputs, args, strict=True))).values()
    torch.testing.assert_close(found, compiled(loaded.model, policy)(*args), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_decoder(tmp_path):
    model, ids = tower(causal=True, rope=True, read="last").float(), tokens_of()
    options = {"tokens": "pyramid-drop"}
    eff.export(model, (ids,), to="onnx", out=tmp_path / "out", options=options, dynamic=False)
    session = load(tmp_path / "out")
    (found,) = session(dict(zip(session.inputs, (ids,), strict=True))).values()
    torch.testing.assert_close(found, compiled(model, "pyramid-drop")(ids), rtol=1e-4, atol=1e-4)
