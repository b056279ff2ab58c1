"""Export encoder-decoders with their caches: two files that write what the model writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import effcompile as eff
from effcompile.cli.huggingface import example_inputs
from effcompile.core.errors import EffError
from effcompile.export_checks import compare_call
from tests.support.hf_zoo import case

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")


def source_of(name: str) -> tuple[Any, dict[str, Any]]:
    """Return a model of the matrix and the arguments of a call of it."""
    found = case(name)
    call = found.call("plain" if name == "whisper" else "right_pad")
    return found.build(), call.make(2, call.length, 0)


def written(folder: Path, source: Mapping[str, Tensor], start: int, count: int) -> list[list[int]]:
    """Let the two files write `count` tokens for every source."""
    encoder, decoder = eff.load(folder / "encoder"), eff.load(folder / "decoder")
    across = encoder({name: source[name] for name in encoder.inputs})
    held = {name.replace("encoder", "decoder"): x[:, :, :0] for name, x in across.items()}
    masks = {"encoder_attention_mask": source["attention_mask"]} if "encoder_attention_mask" in decoder.inputs else {}
    ids, found = torch.full((len(next(iter(across.values()))), 1), start), []
    for _ in range(count):
        made = decoder({"decoder_input_ids": ids, **masks, **held, **across})
        held = {name: made[name.replace("past_key_values", "present")] for name in held}
        ids = made["logits"][:, -1:].argmax(-1)
        found.append(ids)
    return torch.cat(found, 1).tolist()


@pytest.mark.parametrize(
    "name", ["bart", pytest.param("t5", marks=pytest.mark.slow), pytest.param("whisper", marks=pytest.mark.slow)]
)
def test_two_files_write_what_the_model_writes(name: str, tmp_path: Path) -> None:
    model, kwargs = source_of(name)
    for part in ("encoder", "decoder"):
        made = eff.export(model, (), kwargs, to="onnx", out=tmp_path / part, part=part)
        assert max(check.error for check in made.checks) < 1e-5
        names = {tensor.name for tensor in (made.outputs if part == "encoder" else made.inputs)}
        assert "past_key_values.1.encoder.value" in names
        with torch.no_grad():
            errors = compare_call(eff.load(tmp_path / part), made, model, (), kwargs)
        assert max(error for error, _ in errors.values()) < 1e-5
    source = {key: x for key, x in kwargs.items() if isinstance(x, Tensor) and not key.startswith("decoder")}
    start = model.config.decoder_start_token_id
    wanted = torch.full((2, 1), start)
    with torch.no_grad():
        for _ in range(6):
            logits = model(**source, decoder_input_ids=wanted, use_cache=False).logits
            wanted = torch.cat([wanted, logits[:, -1:].argmax(-1)], 1)
    assert written(tmp_path, source, start, 6) == wanted[:, 1:].tolist()


def test_inputs_that_a_configuration_describes() -> None:
    _, made = example_inputs(case("whisper").build(), {"batch": 2, "seq": 3})
    assert {name: tuple(x.shape) for name, x in made.items()} == {
        "input_features": (2, 16, 48),
        "decoder_input_ids": (2, 3),
    }


def test_what_has_no_such_parts(tmp_path: Path) -> None:
    model, kwargs = source_of("bart")
    for more in ({"part": "middle"}, {"cache": True}):
        with pytest.raises(EffError, match="EFF-E176"):
            eff.export(model, (), kwargs, to="onnx", out=tmp_path / "a", **more)
    with pytest.raises(EffError, match="EFF-E176"):
        eff.export(
            case("llama").build(),
            (),
            {"input_ids": torch.ones(2, 8).long()},
            to="onnx",
            out=tmp_path / "a",
            part="decoder",
        )
    assert not (tmp_path / "a").exists()
