"""Check what arms of caches share, and that an arm that is filled again is as one that was made for the new prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import effcompile as eff
from bench import arms_onnx_cache
from bench.cache_arms import make_arm, prefill, shorten, twin
from bench.quality import Score
from effcompile.capture.decoder import cached_decoder
from effcompile.models import zoo
from effcompile.models.text import austen_text, pydoc_text, token_windows
from effcompile.passes.kv.static_channel import StaticChannel
from tests.integrations.test_prepare import llama, words


def test_a_twin_shares_its_weights_and_nothing_else() -> None:
    model = llama(num_hidden_layers=3)
    shorten(model, 1)
    other = eff.prepare(twin(model), kv="int8-per-token")
    assert [x.data_ptr() for x in other.parameters()] == [x.data_ptr() for x in model.parameters()]
    assert len(other.model.layers) == other.config.num_hidden_layers == 1
    ids = words(1, 9)
    with torch.no_grad():
        assert type(model(ids).past_key_values).__name__ == "DynamicCache"
        assert type(other(ids).past_key_values).__name__ == "PackedCache"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "kivi-4", "static-eff"])
def test_an_arm_that_is_filled_again_needs_no_other_graph(name: str) -> None:
    model = llama(num_hidden_layers=1)
    prepared = eff.prepare(twin(model), kv="int8-per-token")
    first, second = words(1, 60, 1), words(1, 60, 2)
    with torch.no_grad():
        arm = make_arm(name, model, prepared, prefill(model, first), 96)
        arm.call(first[:, :1])
        assert arm.fill is not None
        arm.fill(prefill(model, second))
        with torch.compiler.set_stance("fail_on_recompile"):
            found = arm.call(second[:, :1]).clone()
            arm.rewind()
            assert torch.equal(arm.call(second[:, :1]), found)
        wanted = make_arm(name, model, prepared, prefill(model, second), 96).call(second[:, :1])
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_in_onnx_say_what_they_say_in_torch(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    loaded, ranges, prompt = zoo.load("smollm2-135m"), str(tmp_path / "kv.json"), 64
    shorten(loaded.model, 4)
    with torch.no_grad():
        eff.calibrate_kv(loaded.model, token_windows(loaded.tokenizer, austen_text(), 128, 2)[:, None], ranges)
        ids = token_windows(loaded.tokenizer, pydoc_text(), prompt + 64, 1)
        dense, past = loaded.model(ids).logits[0, prompt:], prefill(loaded.model, ids[:, :prompt])
        arm = arms_onnx_cache.make(f"onnx-static-{bits}", loaded.model, past, ranges)
        found = torch.cat([arm.step(ids[:, n : n + 1])[0] for n in range(prompt, ids.shape[1])])
        assert arm.nbytes() < (0.53 if bits == 8 else 0.28) * sum(2 * x.numel() for pair in past for x in pair) * 2
        arm.rewind()
        held = [torch.from_numpy(value.numpy().copy()) for value in arm.held.values()]
        call, wanted = cached_decoder(loaded.model, StaticChannel(bits=bits, ranges=ranges)).module, []
        for n in range(prompt, ids.shape[1]):
            places = (torch.tensor([[n]]),) if call.positions else ()
            logits, *held = call(ids[:, n : n + 1], torch.ones(1, n + 1).long(), *places, *held)
            wanted.append(logits[0])
    scores = []
    for logits in (found, torch.cat(wanted)):
        score = Score()
        score.add(logits, dense, ids[0, prompt:])
        scores.append(score.to_json()["kl"])
    assert scores[0] == pytest.approx(scores[1], rel=0.1), scores
