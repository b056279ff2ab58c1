"""Check every form of MODEL: what it loads, and what it refuses."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from effcompile.cli.models import load_model
from effcompile.core.errors import EffError
from effcompile.models import zoo
from tests.cli.samples import Stack


def refusal(text: str, sizes: dict[str, int] | None = None, dtype: Any = None, real: bool = False) -> EffError:
    with pytest.raises(EffError) as caught:
        load_model(text, sizes or {}, dtype, real=real)
    return caught.value


def test_zoo_without_weights() -> None:
    loaded = load_model("zoo:nanogpt-tiny", {"batch": 2, "seq": 16}, torch.bfloat16, real=False)
    assert isinstance(loaded.model, nn.Module)
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in loaded.model.parameters())
    assert not any(b.is_meta for b in loaded.model.buffers())
    assert loaded.args[0].shape == (2, 16)


def test_zoo_with_weights() -> None:
    loaded = load_model("zoo:llama-tiny", {}, None, real=True)
    expected = zoo.load("llama-tiny").model.state_dict()
    assert isinstance(loaded.model, nn.Module)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())


def test_callable_gets_the_sizes_it_takes() -> None:
    loaded = load_model("tests.cli.samples:plain", {"seq": 48}, None, real=True)
    assert loaded.args[0].shape == (2, 48, 64)
    assert "seq" in refusal("tests.cli.samples:fixed", {"seq": 48}).message
    assert refusal("tests.cli.samples:no_inputs").code == "EFF-U113"


def test_callable_is_built_without_weights() -> None:
    loaded = load_model("tests.cli.samples:plain", {}, None, real=False)
    assert isinstance(loaded.model, nn.Module)
    assert all(p.is_meta for p in loaded.model.parameters())
    assert not loaded.args[0].is_meta


def test_words_that_are_no_model(tmp_path: Path) -> None:
    assert refusal("nonsense").code == "EFF-U110"
    (tmp_path / "model.bin").write_text("x")
    assert "not .pt2" in refusal(str(tmp_path / "model.bin")).message
    assert refusal(str(tmp_path)).code == "EFF-U114"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "architecture" in refusal(str(tmp_path)).message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_hugging_face_folder(folder: Path) -> None:
    loaded = load_model(str(folder), {"batch": 3}, None, real=False)
    assert isinstance(loaded.model, nn.Module)
    assert all(p.is_meta for p in loaded.model.parameters())
    assert loaded.kwargs["input_ids"].shape == (3, 64)
    real = load_model(str(folder), {"seq": 5}, torch.bfloat16, real=True)
    assert isinstance(real.model, nn.Module)
    assert {(p.device.type, p.dtype) for p in real.model.parameters()} == {("cpu", torch.bfloat16)}
    assert real.model(**real.kwargs).logits.shape == (1, 5, 96)


def test_hugging_face_weights_are_safetensors_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "safetensors" in refusal(str(folder), real=True).message


def test_hugging_face_unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LamaForCausalLM"]}))
    assert "LlamaForCausalLM" in refusal(str(folder)).message


# --- .pt2 -------------------------------------------------------------------------------------------------------------


class Touch:
    """Write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.path, "ran")


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    model = Stack("plain").eval()
    seq = torch.export.Dim("seq", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 16, 64),), dynamic_shapes=({1: seq},))
    path = tmp_path / "model.pt2"
    torch.export.save(program, path)
    return path


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members:
            changed = change(name, data)
            if changed is not None:
                archive.writestr(name, changed)


def test_exported_program(exported: Path) -> None:
    loaded = load_model(str(exported), {"seq": 24}, None, real=True)
    assert loaded.args[0].shape == (2, 24, 64)
    assert loaded.runnable(*loaded.args).shape == (2, 24, 64)


def test_sample_inputs_are_never_unpickled(exported: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    evil = pickle.dumps(((Touch(trace),), {}), protocol=2)
    rewrite(exported, lambda name, data: evil if "sample_inputs" in name else data)
    assert load_model(str(exported), {}, None, real=False).args[0].shape[0] == 2
    assert not trace.exists()
    with suppress(RuntimeError):
        torch.export.load(exported)  # what torch does with the same file, so that this test can fail
    assert trace.exists()


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ('"expr_str": "', '"expr_str": "__import__(1) + '),
        ('"expr_str": "', '"expr_str": "eval(s0) + '),
        ('"target": "torch.ops.aten.', '"target": "torch.hub.load.'),
    ],
)
def test_a_graph_that_names_code_is_refused(exported: Path, where: str, what: str) -> None:
    def change(name: str, data: bytes) -> bytes:
        return data.replace(where.encode(), what.encode()) if "/models/" in name else data

    before = exported.read_bytes()
    rewrite(exported, change)
    assert exported.read_bytes() != before
    assert refusal(str(exported)).code == "EFF-U116"


def test_pickles_binaries_and_wrong_names_are_refused(exported: Path) -> None:
    def pickled(name: str, data: bytes) -> bytes:
        if not name.endswith("weights_config.json"):
            return data
        return data.replace(b'"use_pickle": false', b'"use_pickle": true').replace(
            b'"use_pickle":false', b'"use_pickle":true'
        )

    original = exported.read_bytes()
    rewrite(exported, pickled)
    assert "pickle" in refusal(str(exported)).message
    for member in ("model/data/aotinductor/model/x.so", "model/../../x"):
        exported.write_bytes(original)
        with zipfile.ZipFile(exported, "a") as archive:
            archive.writestr(member, b"\x7fELF")
        assert "refused" in refusal(str(exported)).message
    exported.write_bytes(original[: len(original) // 2])
    assert refusal(str(exported)).code == "EFF-U116"
    assert refusal(str(exported.with_name("other.pt2"))).code == "EFF-U116"
