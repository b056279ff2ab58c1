"""Compile models that keep their KV cache in a compressed form: one graph for all steps, which says what it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import effcompile as eff
from tests.integrations.test_prepare import llama, words


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="eff", dynamic=False, options={"strict": True, **options})


def decode(call: Any, ids: Tensor, cache: Any) -> Tensor:
    with torch.no_grad():
        found = [call(ids[:, n : n + 1], past_key_values=cache, use_cache=True).logits for n in range(ids.shape[1])]
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    ("kv", "emit"),
    [("kivi{residual=32}", "inductor"), ("int8-per-token", "interpreter"), ("two-plane{stale=True}", "inductor")],
)
def test_one_graph_serves_every_step(kv: str, emit: str) -> None:
    """Over the packing of two groups, a cut, a reset and a reordering; eager code with the same cache gives the same."""
    model = eff.prepare(llama(), kv=kv, capacity=192)
    ids = words(2, 80)
    caches = [eff.kv_cache(model) for _ in range(2)]
    call = compiled(model, emit=emit)
    for cache in caches:
        with torch.no_grad():
            model(ids[:, :8], past_key_values=cache, use_cache=True)
    places = [tensor.data_ptr() for tensor in caches[0].packed[1].state.values()]
    found = decode(call, ids, caches[0])
    wanted = decode(model, ids, caches[1])
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    for cache in caches:
        assert cache.get_seq_length() == 88
        cache.crop(-30)
        cache.reorder_cache(torch.tensor([1, 0]))
    assert float((decode(call, ids[:, :3], caches[0]) - decode(model, ids[:, :3], caches[1])).abs().max()) < 1e-3
    caches[0].reset()
    decode(call, ids[:, :2], caches[0])
    assert caches[0].get_seq_length() == 2
    assert places == [tensor.data_ptr() for tensor in caches[0].packed[1].state.values()]
    report = eff.report()
    assert report["counters"] == {"graphs": 1, "sites": 0, "missed": 0, "caches": 2}
    (first, second) = report["graphs"][0]["caches"]
    assert (first["id"], second["id"]) == ("model.layers.0.self_attn.cache", "model.layers.1.self_attn.cache")
    assert first["format"] == kv
    assert first["capacity"] == 192
    assert "modeling_llama.py" in first["source"]


def test_tokens_are_divided_in_compiled_steps() -> None:
    """A prompt by eager code, then steps in one graph, over a division of what they have brought."""
    model = eff.prepare(llama(), kv="zipvl-mixed{residual=32,interval=32,recent=8,spread=8}", capacity=192)
    ids = words(2, 70)
    caches = [eff.kv_cache(model) for _ in range(2)]
    call = compiled(model, emit="inductor")
    for cache in caches:
        with torch.no_grad():
            model(ids[:, :64], past_key_values=cache, use_cache=True)
    found, wanted = decode(call, ids, caches[0]), decode(model, ids, caches[1])
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    state = caches[0].packed[1].state
    assert int(state["a_length"]) + int(state["b_length"]) == 134 - int(state["length"]) > 64
    report = eff.report()
    assert report["counters"]["graphs"] == 1
    assert [row["format"] for row in report["graphs"][0]["caches"]] == [caches[0].packed[0].spelled] * 2


def test_a_full_cache_is_an_error_in_compiled_code_too() -> None:
    model = eff.prepare(llama(), kv="int8-per-token", capacity=64)
    cache = eff.kv_cache(model, batch=1)
    call = compiled(model, emit="interpreter")
    decode(call, words(1, 64), cache)
    with pytest.raises(eff.EffError, match="EFF-K201"):
        decode(call, words(1, 1), cache)
    assert [layer.length for layer in cache.packed] == [64, 64]


def test_a_compiled_prefill_builds_the_cache() -> None:
    model = eff.prepare(llama(), kv="kivi{residual=64}", capacity=128)
    call = compiled(model, emit="interpreter")
    with torch.no_grad():
        found, wanted = call(words(2, 100)), model(words(2, 100))
    assert float((found.logits - wanted.logits).abs().max()) < 1e-4
    assert found.past_key_values.get_seq_length() == 100
    for layer, other in zip(found.past_key_values.packed, wanted.past_key_values.packed):
        for x, y in zip(layer.read(), other.read()):
            assert float((x - y).abs().max()) < 1e-4 * float(y.abs().max()) + 0.2  # a code may fall on the other side


def test_generate_compiles_the_step() -> None:
    """transformers' own way to compile: a CompileConfig in the generation config."""
    from transformers import CompileConfig

    model = eff.prepare(llama(), kv="int8-per-token")
    ids = words(1, 10)
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False)
    config = CompileConfig(backend="eff", mode=None, options={"strict": True, "emit": "interpreter"}, dynamic=False)
    config._compile_all_devices = True
    found = model.generate(ids, max_new_tokens=12, do_sample=False, compile_config=config)
    assert torch.equal(found, wanted)
    assert eff.report()["counters"]["graphs"] == 1


def test_explain_lists_the_caches() -> None:
    model = eff.prepare(llama(), kv="kivi{bits=2,group=32,residual=64}", capacity=128)
    told = eff.explain(model, words(2, 4))
    assert "2 KV caches" in str(told)
    assert "model.layers.{0-1}.self_attn.cache: B=2 H=2 D=32 float32  128 tokens  kivi{bits=2,residual=64}" in str(told)
    assert [row["format"] for row in told.to_json()["caches"]] == ["kivi{bits=2,residual=64}"] * 2
    assert not told.unseen
