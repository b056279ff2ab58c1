"""Export decoders with their cache: names, sizes, padding, experts, codes, and text that they write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import effcompile as eff
from effcompile.capture import decoder
from effcompile.capture.decoder import cached_decoder
from effcompile.codegen.onnx.check import errors_of_codes
from effcompile.codegen.onnx.generate import continuation
from effcompile.core.bundle import read_artifact
from effcompile.core.errors import EffError
from effcompile.ops.kv import fixed
from effcompile.passes.kv.static_channel import StaticChannel
from tests.support.export_cases import ExportCase, export_cases
from tests.support.export_coverage import exported, recorded

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")
CASES = {case.name: case for case in export_cases()}


def test_a_decoder_takes_and_returns_its_cache(tmp_path: Path) -> None:
    model = CASES["llama"].build()
    made = eff.export(model, (), {"input_ids": torch.ones(2, 8, dtype=torch.long)}, to="onnx", out=tmp_path / "a")
    total = "past_sequence_length + sequence_length"
    assert [(x.name, x.shape) for x in made.inputs[:4]] == [
        ("input_ids", ("batch_size", "sequence_length")),
        ("attention_mask", ("batch_size", total)),
        ("position_ids", ("batch_size", "sequence_length")),
        ("past_key_values.0.key", ("batch_size", 2, "past_sequence_length", 8)),
    ]
    assert [x.name for x in made.outputs] == ["logits", *(f"present.{n}.{w}" for n in (0, 1) for w in ("key", "value"))]
    assert made.outputs[1].shape == ("batch_size", 2, total, 8)
    points = [dict(check.sizes) for check in made.checks]
    for batch, length, past in ((3, 1, 7), (1, 6, 0)):
        assert {"batch_size": batch, "sequence_length": length, "past_sequence_length": past} in points
    with read_artifact(tmp_path / "a") as found, torch.no_grad():
        session = eff.load(tmp_path / "a")
        ids = list(continuation(session, found.manifest, [5, 9, 7], 6))
        wanted = model.generate(torch.tensor([[5, 9, 7]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert ids == wanted[0, 3:].tolist()


def test_experts_that_nobody_chose_cost_nothing(tmp_path: Path) -> None:
    row = exported(CASES["qwen3-moe"], tmp_path / "a")
    assert row["forms"] == "2 x expert-loop"
    assert row["error"] < 1e-5


def test_codes_in_the_cache(tmp_path: Path) -> None:
    build = ExportCase("llama16", "decoder", _wide).build
    model = build()
    eff.calibrate_kv(model, [torch.randint(4, 96, (2, 32))], tmp_path / "kv.json")
    kv = f"static-channel{{bits=4,ranges={tmp_path / 'kv.json'}}}"
    made = eff.export(model, (), {}, to="onnx", out=tmp_path / "a", cache=True, options={"kv": kv})
    codes = [x for x in made.inputs if x.name.startswith("past_key_values")]
    assert {(x.dtype, x.shape[3]) for x in codes} == {("uint8", 8)}
    assert max(check.error for check in made.checks if check.output == "logits") < 1e-4
    with pytest.raises(EffError, match="EFF-E118"):
        eff.export(model, (), {}, to="onnx", out=tmp_path / "b", cache=True, options={"kv": "int8-per-token"})
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_those_of_the_cache_format(bits: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x, scales = torch.randn(2, 3, 5, 16, generator=draw), torch.rand(3, 16, generator=draw) / 4 + 0.01
    codes = fixed.quantize(x, scales, bits)
    assert torch.equal(decoder.quantize(x, scales, bits), codes)
    assert torch.equal(decoder.dequantize(codes, scales), fixed.dequantize(codes, scales))


@pytest.mark.parametrize("own", [True, False])
def test_eager_follows_the_codes_of_another_runtime(own: bool, tmp_path: Path) -> None:
    model = _wide()
    eff.calibrate_kv(model, [torch.randint(4, 96, (2, 32))], tmp_path / "kv.json")
    call = cached_decoder(model, StaticChannel(bits=8, ranges=str(tmp_path / "kv.json")), own=own)
    point = call.point(2, 5, 4)

    class Other:
        """Give eager's own numbers, with one code changed by `step` in a place."""

        inputs, outputs = call.inputs, call.outputs

        def __init__(self, step: int, place: int) -> None:
            self.step, self.place = step, place

        def __call__(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            _, *codes = call.module(*given.values())
            codes[0][0, 0, self.place, 0] += self.step * (1 if codes[0][0, 0, self.place, 0] < 0 else -1)
            return dict(zip(self.outputs, (call.module.follow(list(given.values()), codes)[0], *codes)))

    with torch.no_grad():
        for step, place, fine in ((0, -1, True), (1, -1, False), (1, 0, False)):
            found = errors_of_codes(Other(step, place), point.args, call.module.follow, len(call.outputs), point.real)
            assert found["logits"][0] < 1e-5
            assert (found["present.0.key"][0] < 1e-4) == fine


def _wide() -> torch.nn.Module:
    from tests.support.hf_zoo.decoders import decoder_fields
    from tests.support.hf_zoo.weights import hugging_face

    return hugging_face("LlamaConfig", "LlamaForCausalLM", **decoder_fields(head_dim=16))()


def test_a_model_without_such_a_cache_is_refused() -> None:
    with pytest.raises(EffError, match="EFF-E117"):
        cached_decoder(CASES["bert"].build())


@pytest.mark.slow
@pytest.mark.parametrize(("opset", "flavor"), [(23, "portable"), (24, "portable"), (20, "ort")])
def test_operators_of_later_opsets_and_of_onnx_runtime(opset: int, flavor: str, tmp_path: Path) -> None:
    row = exported(CASES["llama"], tmp_path / "a", opset, flavor)
    assert row["error"] < 1e-5
    if flavor == "ort":
        assert row["forms"] == "2 x group-query"
    else:
        assert "rms-norm" in row["forms"]
        assert "rope" in row["forms"]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_in_one_operator(bits: int, tmp_path: Path) -> None:
    model = _wide()
    eff.calibrate_kv(model, [torch.randint(4, 96, (2, 32))], tmp_path / "kv.json")
    kv = f"static-channel{{bits={bits},ranges={tmp_path / 'kv.json'}}}"
    made = eff.export(model, (), {}, to="onnx", out=tmp_path / "a", cache=True, flavor="ort", options={"kv": kv})
    assert dict(made.details)["forms"] == "2 x group-query"
    assert max(check.error for check in made.checks) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_every_model_that_held_holds(name: str, tmp_path: Path) -> None:
    before = recorded()[name]
    row = exported(CASES[name], tmp_path / "a", before["opset"], before["flavor"])
    assert ("failed" in row) == ("failed" in before), row


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", ["zoo:smollm2-135m", "zoo:minilm-l6", "zoo:dinov2-s"])
def test_trained_weights(name: str, tmp_path: Path) -> None:
    from effcompile.cli.models import load_model
    from effcompile.export_checks import compare

    given = load_model(name, {"batch": 2, "seq": 24}, None, real=True)
    eff.export(given.model, given.args, given.kwargs, to="onnx", out=tmp_path / "a", tokenizer=given.tokenizer)
    other = load_model(name, {"batch": 1, "seq": 40}, None, real=True)
    errors = compare(eff.load(tmp_path / "a"), given.runnable, other.args, other.kwargs)
    assert max(error for error, _ in errors.values()) < 1e-4


@pytest.mark.slow
@pytest.mark.network
def test_a_trained_model_writes_what_eager_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from effcompile.models import zoo
    from tests.cli.command import run

    loaded, out = zoo.load("zoo:smollm2-135m"), str(tmp_path / "a")
    assert run(capsys, "export", "zoo:smollm2-135m", "--cache", "-o", out).code == 0
    told = json.loads(run(capsys, "run", out, "--text", "The capital of France is", "--tokens", "12", "--json").out)
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = loaded.model.generate(ids, max_new_tokens=12, do_sample=False)
    assert told["text"] == loaded.tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
