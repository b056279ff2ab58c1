"""Run small transformers models with caches that drop tokens: generate, padding, beams, windows, compiled steps, the page on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import effcompile as eff
from effcompile.core.errors import EffError
from tests.integrations.test_prepare import llama, sinks, sliding, steps, words

LOOSE = ("sink-window", "snapkv", "expected-attention{keep=1}", "keyformer{keep=1}")
"""Drops nothing of a context of 200 tokens."""
TIGHT = {
    "sink-window{window=20,sinks=2}": 22,
    "snapkv{budget=24,window=8}": 24,
    "expected-attention{keep=0.5,least=16}": 20,
    "keyformer{keep=0.5,least=16}": 20,
}
"""Tokens that stay of a prompt of 40."""


@pytest.mark.parametrize("make", [llama, sliding, sinks])
@pytest.mark.parametrize("evict", LOOSE)
def test_a_cache_that_drops_nothing_says_what_the_model_says(make: Any, evict: str) -> None:
    from transformers import DynamicCache

    model, ids, parts = make(), words(2, 62), (40, 1, 1, 17, 1, 1, 1)
    model.set_attn_implementation("eager")
    wanted = steps(model, ids, DynamicCache(config=model.config), parts)
    eff.prepare(model, evict=evict)
    cache = eff.kv_cache(model)
    found = steps(model, ids, cache, parts)
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    assert cache.evicted == 0


@pytest.mark.parametrize("kv", [None, "int8-per-token", "kivi{residual=32}"])
@pytest.mark.parametrize("evict", TIGHT)
def test_generate_evicts_and_says_so(kv: str | None, evict: str) -> None:
    model = eff.prepare(llama(), kv=kv, evict=evict)
    made = model.generate(words(2, 40), max_new_tokens=30, min_new_tokens=30, return_dict_in_generate=True)
    cache = made.past_key_values
    assert made.sequences.shape == (2, 70)
    assert cache.get_seq_length() == 69
    stepping = "sink" in evict or "keyformer" in evict
    held = {layer.length for layer in cache.packed}
    if kv is None or "kivi" not in kv:
        assert held == {TIGHT[evict] + (0 if stepping else 29)}
    assert cache.evicted == 69 - max(held) > 0
    assert f"69 tokens seen, {max(held)} held, {cache.evicted} evicted" in repr(cache)
    assert evict.partition("{")[0] in repr(cache)
    assert cache.nbytes() == sum(x.numel() * x.element_size() for layer in cache.packed for x in layer.state.values())
    if stepping and kv is None:
        whole = eff.kv_cache(model, "plain", capacity=70, batch=2)
        assert cache.nbytes() < 0.5 * whole.nbytes()


@pytest.mark.parametrize("evict", TIGHT)
def test_positions_count_the_whole_context(evict: str) -> None:
    """A step says what the unmodified model says where a mask hides the dropped tokens from it, head by head."""
    from transformers import DynamicCache

    model, ids = llama(num_hidden_layers=1), words(1, 60)
    plain = llama(num_hidden_layers=1)
    plain.set_attn_implementation("sdpa")
    eff.prepare(model, evict=evict)
    cache, own = eff.kv_cache(model), DynamicCache(config=plain.config)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache, use_cache=True)
        plain(ids[:, :40], past_key_values=own, use_cache=True)
        for n in range(40, 60):
            layer = cache.packed[0]
            held = layer.state["positions"][0, :, : layer.length].long()
            seen = torch.zeros(2, n + 1, dtype=torch.bool).scatter(1, held, True)
            seen[:, n] = True
            mask = seen.repeat_interleave(2, 0)[None, :, None]
            wanted = plain(ids[:, n : n + 1], attention_mask=mask, past_key_values=own, use_cache=True).logits
            found = model(ids[:, n : n + 1], past_key_values=cache, use_cache=True).logits
            assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max()), n
    assert cache.evicted > 0


@pytest.mark.parametrize(
    "evict", ["sink-window{window=20,sinks=2}", "keyformer{keep=0.5,least=24}", "snapkv{budget=24,window=8}"]
)
def test_a_padded_sequence_generates_what_it_generates_alone(evict: str) -> None:
    model = eff.prepare(llama(), evict=evict)
    ids = words(2, 45)
    ids[0, :10] = 0
    mask = (ids != 0).long()
    given = {"max_new_tokens": 15, "min_new_tokens": 15, "do_sample": False}
    both = model.generate(ids, attention_mask=mask, **given)
    assert torch.equal(both[1:], model.generate(ids[1:], **given))
    assert torch.equal(both[:1, 10:], model.generate(ids[:1, 10:], **given))


@pytest.mark.parametrize("evict", TIGHT)
def test_beams_take_what_they_hold_along(evict: str) -> None:
    """Sequences beside each other end as they do alone."""
    model = eff.prepare(llama(), evict=evict)
    ids = words(2, 40)
    found = model.generate(ids, max_new_tokens=12, min_new_tokens=12, num_beams=3)
    assert found.shape == (2, 52)
    alone = [model.generate(ids[n : n + 1], max_new_tokens=12, min_new_tokens=12, num_beams=3) for n in range(2)]
    assert torch.equal(found, torch.cat(alone))


def decode(call: Any, ids: Tensor, cache: Any) -> Tensor:
    with torch.no_grad():
        found = [call(ids[:, n : n + 1], past_key_values=cache, use_cache=True).logits for n in range(ids.shape[1])]
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    ("kv", "evict", "emit"),
    [
        (None, "sink-window{window=20,sinks=2}", "inductor"),
        ("kivi{residual=32}", "keyformer{keep=0.5,least=16}", "interpreter"),
        ("int8-per-token", "snapkv{budget=24,window=8}", "interpreter"),
        pytest.param(None, "keyformer{keep=0.5,least=16}", "inductor", marks=pytest.mark.slow),
        pytest.param("int8-per-token", "sink-window{window=20,sinks=2}", "interpreter", marks=pytest.mark.slow),
        pytest.param("kivi{residual=32}", "expected-attention{keep=0.5,least=16}", "inductor", marks=pytest.mark.slow),
    ],
)
def test_one_compiled_graph_serves_every_step(kv: str | None, evict: str, emit: str) -> None:
    model = eff.prepare(llama(), kv=kv, evict=evict, capacity=160)
    ids = words(2, 90)
    caches = [eff.kv_cache(model) for _ in range(2)]
    call = torch.compile(model, backend="eff", dynamic=False, options={"strict": True, "emit": emit})
    for cache in caches:
        with torch.no_grad():
            model(ids[:, :40], past_key_values=cache, use_cache=True)
    found, wanted = decode(call, ids[:, 40:], caches[0]), decode(model, ids[:, 40:], caches[1])
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    assert caches[0].evicted == caches[1].evicted > 0
    assert caches[0].get_seq_length() == 90
    report = eff.report()
    assert report["counters"] == {"graphs": 1, "sites": 0, "missed": 0, "caches": 2}
    assert evict.partition("{")[0] in report["graphs"][0]["caches"][0]["format"]
    if kv == "int8-per-token":
        before = [x.clone() for layer in caches[0].packed for x in layer.state.values()]
        with pytest.raises(EffError, match="EFF-K206"), torch.no_grad():
            call(ids[:, :40], past_key_values=caches[0], use_cache=True)
        assert all(map(torch.equal, before, (x for layer in caches[0].packed for x in layer.state.values())))


def test_a_compiled_prefill_evicts() -> None:
    model = eff.prepare(llama(), evict="snapkv{budget=24,window=8}", capacity=128)
    call = torch.compile(model, backend="eff", dynamic=False, options={"strict": True, "emit": "interpreter"})
    with torch.no_grad():
        found, wanted = call(words(2, 60)).past_key_values, model(words(2, 60)).past_key_values
    assert found.evicted == wanted.evicted == 36
    for layer, other in zip(found.packed, wanted.packed):
        assert torch.equal(layer.state["positions"], other.state["positions"])


def test_what_cannot_be_is_refused() -> None:
    model = llama()
    for evict, code in (("snapkv{budget=8}", "EFF-U004"), ("snapkv{bugdet=8}", "EFF-U003"), ("keyfromer", "EFF-U014")):
        with pytest.raises(EffError, match=code):
            eff.prepare(model, evict=evict)
    rotary = model.model.rotary_emb
    model.model.other = type(rotary)(model.config)
    with pytest.raises(EffError, match="EFF-K206"):
        eff.prepare(model, evict="expected-attention")
    with pytest.raises(EffError, match=r"EFF-K201.*nothing has run"):
        eff.prepare(model, evict="snapkv", capacity=50).generate(words(1, 45), max_new_tokens=10)


def test_the_page_on_caches_runs() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "kv_cache.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    exec(compile(code, str(page), "exec"), {})
