"""Run small transformers models with compressed caches: calls, generate, padding, beams, windows, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import effcompile as eff
from effcompile.core.errors import EffError

WIDE = "kivi{bits=4,group=32,residual=256}"
"""Exact for contexts of up to 256 tokens: what differs from the model's own cache is a mistake of ours."""
MIXED = "zipvl-mixed{{residual=128}}"
"""Exact for a prompt that fits what is not packed."""
LLAMA = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def llama(**fields: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **HEADS, "pad_token_id": 0, **fields})).eval()


def sliding() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    fields = {**LLAMA, **HEADS, "sliding_window": 8, "query_pre_attn_scalar": 32, "pad_token_id": 0}
    return Gemma2ForCausalLM(Gemma2Config(**fields)).eval()


def sinks() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    fields = {**LLAMA, **HEADS, "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = GptOssForCausalLM(GptOssConfig(**fields, pad_token_id=0)).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def words(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def steps(model: Any, ids: Tensor, cache: Any, parts: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
    """Return the logits of calls with `parts` tokens each."""
    found, start = [], 0
    with torch.no_grad():
        for count in parts:
            given = {} if mask is None else {"attention_mask": mask[:, : start + count]}
            part = ids[:, start : start + count]
            found.append(model(part, past_key_values=cache, use_cache=True, **given).logits)
            start += count
    return torch.cat(found, 1)


@pytest.mark.parametrize("make", [llama, sliding, sinks])
@pytest.mark.parametrize("parts", [(20, 1, 1, 1), (1, 1, 30, 17, 1), (3, 40, 1)])
def test_within_the_residual_a_model_says_what_it_says_with_its_own_cache(make: Any, parts: tuple[int, ...]) -> None:
    from transformers import DynamicCache

    model = make()
    model.set_attn_implementation("eager")
    ids = words(2, sum(parts))
    wanted = steps(model, ids, DynamicCache(config=model.config), parts)
    eff.prepare(model, kv=WIDE)
    found = steps(model, ids, eff.kv_cache(model), parts)
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("kv", [WIDE, "int8-per-token", "kivi{residual=32}"])
def test_left_padding_is_honored(kv: str) -> None:
    """A sequence in a padded batch gives what it gives alone; a dropped mask would be seen at once."""
    model = llama()
    eff.prepare(model, kv=kv)
    ids, parts = words(2, 70), (60, 1, 1, 8)
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    padded = eff.kv_cache(model, capacity=96)
    found, start = [], 0
    with torch.no_grad():
        for count in parts:
            end = start + count
            call = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end], "past_key_values": padded}
            found.append(model(ids[:, start:end], use_cache=True, **call).logits)
            start = end
    alone = steps(model, ids[:1, 25:], eff.kv_cache(model), (35, 1, 1, 8))
    whole = steps(model, ids[1:], eff.kv_cache(model), parts)
    logits = torch.cat(found, 1)
    # Groups of tokens begin elsewhere in the padded batch, so packed keys are rounded otherwise there.
    near = 0.2 if "residual=32" in kv else 1e-4
    assert float((logits[:1, 25:] - alone).abs().max()) < near * float(alone.abs().max())
    assert float((logits[1:] - whole).abs().max()) < 1e-4 * float(whole.abs().max())


@pytest.mark.parametrize(
    "kv", ["static-channel{{bits=8,ranges={}}}", "two-plane{{theta=0.3}}", "two-plane{{stale=True}}", MIXED]
)
def test_formats_of_many_bits_generate_what_the_model_does(kv: str, tmp_path: Path) -> None:
    """Greedy tokens of a random model are close calls, so the logits of its own cache are what is compared."""
    from transformers import DynamicCache

    model, ids, parts = llama(), words(2, 70), (40, 1, 1, 7, 1, 20)
    with torch.no_grad():
        wanted = steps(model, ids, DynamicCache(), parts)
    calls = [ids[:1], {"input_ids": ids[1:]}]
    ranges = eff.calibrate_kv(model, calls, tmp_path / "kv.json")
    assert sorted(ranges.layers) == [0, 1]
    together = eff.calibrate_kv(model, [ids], tmp_path / "together.json")
    torch.testing.assert_close(dict(together.layers), dict(ranges.layers))
    eff.prepare(model, kv=kv.format(tmp_path / "kv.json"))
    found = steps(model, ids, eff.kv_cache(model, capacity=96), parts)
    assert float((found - wanted).abs().max()) < 0.03 * float(wanted.abs().max())
    assert float((found[:, :40] - wanted[:, :40]).abs().max()) < 1e-5  # a prompt reads its own tokens as they are
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 74)
    eff.calibrate_kv(model, calls, tmp_path / "again.json")  # with the model's own cache, though it is prepared
    assert (tmp_path / "again.json").read_text() == (tmp_path / "kv.json").read_text()
    assert "_eff_kv" in model.__dict__
    with pytest.raises(EffError, match="EFF-K207"):
        eff.calibrate_kv(model, [], tmp_path / "none.json")
    with pytest.raises(EffError, match="EFF-K207"):
        eff.prepare(model, kv="static-channel")


def test_plain_calls_and_generate_build_the_cache_by_themselves() -> None:
    model = llama()
    ids = words(2, 12)
    with torch.no_grad():
        wanted = model.generate(ids, max_new_tokens=20, do_sample=False)
        eff.prepare(model, kv=WIDE)
        cache = model(ids).past_key_values
        assert type(cache).__name__ == "PackedCache"
        assert cache.get_seq_length() == 12
        assert (
            cache.nbytes()
            == sum(x.numel() * x.element_size() for layer in cache.packed for x in layer.state.values())
            > 0
        )
        assert model(ids, use_cache=False).past_key_values is None
        found = model.generate(ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
        assert torch.equal(found.sequences, wanted)
        assert type(found.past_key_values).__name__ == "PackedCache"
        static = model.generate(ids, max_new_tokens=20, do_sample=False, cache_implementation="static")
        assert torch.equal(static, wanted)
        own = eff.kv_cache(model, "int8-per-token", capacity=64)
        model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=own)
        assert own.get_seq_length() == 31
        # The turn after it reads what is there: a prefix that is used again.
        more = model.generate(
            torch.cat([ids, words(2, 22, 1)], 1), max_new_tokens=3, do_sample=False, past_key_values=own
        )
        assert more.shape == (2, 37)
        eff.prepare(model)
        assert type(model(ids).past_key_values).__name__ == "DynamicCache"
        eff.prepare(model, kv="fp8")
        assert [layer.spelled for layer in model(ids).past_key_values.packed] == ["fp8", "fp8"]
        assert len(model._forward_pre_hooks) == 1


@pytest.mark.parametrize(
    "extra", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"num_return_sequences": 2}]
)
def test_beams_and_several_results(extra: dict[str, Any]) -> None:
    model = llama()
    ids = words(2, 9)
    sampled = "num_beams" not in extra
    results = []
    for kv in (None, WIDE):
        eff.prepare(model, kv=kv)
        torch.manual_seed(3)
        results.append(model.generate(ids, max_new_tokens=12, do_sample=sampled, **extra))
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("kv", ["int8-per-token", "kivi{residual=32}", "two-plane"])
def test_a_prefix_is_read_once_and_serves_several_continuations(kv: str) -> None:
    """As transformers' documentation does it: a copy of the prefix's cache for each prompt, in calls and in generate."""
    model = eff.prepare(llama(), kv=kv)
    prefix, more = words(1, 70), [words(1, 9, seed) for seed in (1, 2)]
    kept = eff.kv_cache(model, capacity=128)
    steps(model, prefix, kept, (70,))
    before = [x.clone() for layer in kept.packed for x in layer.state.values()]
    given = {"max_new_tokens": 6, "do_sample": False}
    for part in more:
        ids = torch.cat([prefix, part], 1)
        cache, fresh = copy.deepcopy(kept), eff.kv_cache(model, capacity=128)
        found = model.generate(ids, past_key_values=cache, **given)
        steps(model, prefix, fresh, (70,))
        assert torch.equal(found, model.generate(ids, past_key_values=fresh, **given))
        assert cache.get_seq_length() == 70 + 9 + 5
    assert all(map(torch.equal, before, (x for layer in kept.packed for x in layer.state.values())))


def test_a_full_cache_is_an_error_and_stays_as_it_was() -> None:
    model = llama()
    eff.prepare(model, kv="int8-per-token", capacity=64)
    cache = eff.kv_cache(model)
    steps(model, words(1, 60), cache, (60,))
    before = [layer.read() for layer in cache.packed]
    with pytest.raises(EffError, match=r"EFF-K201.*60 of 64"):
        steps(model, words(1, 5), cache, (5,))
    assert [layer.length for layer in cache.packed] == [60, 60]
    for layer, (keys, values) in zip(cache.packed, before):
        assert torch.equal(layer.read()[0], keys)
        assert torch.equal(layer.read()[1], values)
    with pytest.raises(EffError, match=r"EFF-K201.*nothing has run"):
        model.generate(words(1, 60), max_new_tokens=10)
    cache.crop(-10)
    assert cache.get_seq_length() == 50
    cache.reset()
    assert cache.get_seq_length() == 0


def test_what_cannot_be_is_refused_before_anything_runs() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = llama()
    for kv, code in (
        ("kivi{bits=5}", "EFF-U004"),
        ("kivi{bit=4}", "EFF-U003"),
        ("kiwi", "EFF-U014"),
        ("kivi{group=64,residual=64}", "EFF-K204"),
    ):
        with pytest.raises(EffError, match=code):
            eff.prepare(model, kv=kv)
    with pytest.raises(EffError, match="EFF-U014"):
        eff.prepare(model, evict="snapvk")
    with pytest.raises(EffError, match="EFF-K205"):
        eff.kv_cache(model)
    unprepared = eff.kv_cache(llama(), "int8-per-token")
    with pytest.raises(EffError, match=r"(?s)EFF-K205.*eff\.prepare"):
        steps(llama(), words(1, 4), unprepared, (4,))
    small = T5Config(vocab_size=20, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)
    with pytest.raises(EffError, match="EFF-K205"):
        eff.prepare(T5ForConditionalGeneration(small), kv="int8-per-token")
    prepared = eff.prepare(llama(attention_dropout=0.5), kv="int8-per-token").train()
    with pytest.raises(EffError, match=r"EFF-K205.*dropout"):
        prepared(words(1, 4), past_key_values=eff.kv_cache(prepared), use_cache=True)
