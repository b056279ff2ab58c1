"""Check that shortened programs hold standard operators with static counts, and that ONNX Runtime gives their numbers."""

import pytest
import torch

import effcompile as eff
from effcompile.compiler import all_tokens
from effcompile.exporting import load
from effcompile.models import zoo
from tests.passes.tokens.test_caches import Prefill
from tests.passes.tokens.test_drop import compiled, padding_of, tokens_of, tower

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
SLOW = pytest.mark.slow
ENCODERS = {
    "tome": "tome{ratio=0.5}",
    "tomesd": "tomesd{grid=[4,6]}",
    "evit": "evit{keep=0.5,every=1}",
    "spatten": "spatten{keep=0.6}",
    "heads": "spatten{keep=0.6,heads=0.5}",
    "heads-alone": "spatten{keep=1.0,heads=0.5}",
}
DECODERS = {
    "spatten": "spatten{keep=0.6,fair=true}",
    "fastv": "fastv{ratio=0.5}",
    "pyramid-drop": "pyramid-drop",
    "heads": "spatten{heads=0.5}",
}


def exported(model, args, policy, folder):
    """Export, run in ONNX Runtime, and return its results with those of the compiled program; check what the graph holds."""
    options = {} if policy is None else {"tokens": policy}
    manifest = eff.export(model, args, to="onnx", out=folder, options=options, dynamic=False)
    graph = onnx.load(folder / "model.onnx").graph
    assert not {node.domain for node in graph.node} - {"", "ai.onnx"}
    fixed = {item.name for item in graph.initializer} | {n.output[0] for n in graph.node if n.op_type == "Constant"}
    assert all(node.input[1] in fixed for node in graph.node if node.op_type == "TopK"), "a number that is not static"
    session = load(folder)
    found = list(session(dict(zip(session.inputs, args, strict=True))).values())
    if policy is None:
        torch._dynamo.reset()
        wanted = torch.compile(model, backend="eff", options={"strict": True, "emit": "interpreter"})(*args)
    else:
        wanted = compiled(model, policy)(*args)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    return manifest, {node.op_type for node in graph.node}


def test_every_policy_is_here():
    assert {*ENCODERS, *DECODERS} - {"heads", "heads-alone"} == {policy.name for policy in all_tokens()}


@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW) for name in ENCODERS])
def test_encoders(tmp_path, name):
    model = tower(heads=8, width=64).float()
    manifest, operators = exported(model, (tokens_of(),), ENCODERS[name], tmp_path / "out")
    assert any(site.form.startswith(ENCODERS[name].split("{")[0]) for site in manifest.sites)
    assert "TopK" in operators


@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW) for name in DECODERS])
def test_decoders(tmp_path, name):
    model = tower(causal=True, rope=True, read="last", kv_heads=4, heads=8, width=64).float()
    _, operators = exported(model, (tokens_of(),), DECODERS[name], tmp_path / "out")
    assert "TopK" in operators


@SLOW
@torch.no_grad()
def test_padding_and_returned_keys(tmp_path):
    model = tower(post=True, read="first").float()
    exported(model, (tokens_of(), padding_of()), "spatten{keep=0.6}", tmp_path / "padded")
    model = Prefill(tower(rope=True, causal=True)).float()
    exported(model, (tokens_of(),), "pyramid-drop{cache=true}", tmp_path / "keys")


@SLOW
@torch.no_grad()
@pytest.mark.parametrize("policy", ["tome{ratio=0.5}", "spatten{keep=0.6}"])
def test_image_encoder(tmp_path, policy):
    loaded = zoo.load("vit-tiny")
    args, _ = loaded.example_inputs(2)
    options = {"tokens": policy}
    with pytest.raises(Exception, match="EFF-R102"):  # sizes of the image that vary make the number of tokens a symbol
        eff.export(loaded.model, args, to="onnx", out=tmp_path / "out", options=options)
    manifest, operators = exported(loaded.model, args, policy, tmp_path / "out")
    assert any(site.form.startswith(policy.split("{")[0]) for site in manifest.sites)
    assert "TopK" in operators


@SLOW
@torch.no_grad()
@pytest.mark.parametrize("name", ["recursions-tiny", "duo-tiny", "codebook-tiny"])
def test_adaptive_models(tmp_path, name):
    """Recursions run on their tokens in ONNX too; what has no standard operator runs as the model is written."""
    loaded = zoo.load(name)
    args, _ = loaded.example_inputs(2, 24)
    _, operators = exported(loaded.model, args, None, tmp_path / "out")
    if name == "recursions-tiny":
        graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "out" / "model.onnx")).graph
        shapes = {tuple(d.dim_value for d in item.type.tensor_type.shape.dim) for item in graph.value_info}
        assert {(2, count, 64) for count in loaded.model.config.kept(24)} <= shapes
        assert {"TopK", "GatherElements"} <= operators


@SLOW
@torch.no_grad()
@pytest.mark.parametrize("policy", ["tome{ratio=0.5}", "spatten{keep=0.7,heads=0.6}"])
def test_an_engine_of_a_shortened_image_encoder(tmp_path, policy):
    """TensorRT-RTX builds it for a chip that is not here; its ONNX gives the numbers."""
    pytest.importorskip("tensorrt_rtx")
    loaded = zoo.load("vit-tiny")
    args, _ = loaded.example_inputs(2)
    made = eff.export(
        loaded.model,
        args,
        to="tensorrt-rtx",
        target="sm_89",
        out=tmp_path / "out",
        options={"tokens": policy},
        dynamic=False,
    )
    assert [name for name, entry in made.files if entry.native] == ["engines/sm_89.engine"]
    assert any(site.form.startswith(policy.split("{")[0]) for site in made.sites)
    found = load(tmp_path / "out")({made.inputs[0].name: args[0]})
    torch.testing.assert_close(next(iter(found.values())), compiled(loaded.model, policy)(*args), rtol=1e-3, atol=1e-3)
