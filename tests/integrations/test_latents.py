"""Run small models of the DeepSeek kind, whose caches hold latents (MLA), with those in 8 bits; and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import effcompile as eff
from effcompile.core.errors import EffError
from tests.integrations.test_prepare import LLAMA, steps, words

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 48}
SIZES = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24, "initializer_range": 0.1}


def latents(kind: str = "DeepseekV3", **more: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    fields = {**LLAMA, **HEADS, **SIZES, "first_k_dense_replace": 2, "pad_token_id": 0, **more}
    if kind == "DeepseekV3":
        fields |= {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    config = getattr(transformers, f"{kind}Config")(**fields)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", ["DeepseekV3", "DeepseekV2"])
@pytest.mark.parametrize(("kv", "off"), [("plain", 1e-5), ("int8-per-token", 0.05), ("fp8", 0.3)])
def test_a_prompt_and_steps_say_what_the_model_says(kind: str, kv: str, off: float) -> None:
    """A prompt, chunks and single tokens; the first is read as it is, and 16 bits lose nothing."""
    model = latents(kind)
    ids, parts = words(2, 70), (50, 3, 12, 1, 1, 1, 1, 1)
    with torch.no_grad():
        wanted = model(ids).logits
    eff.prepare(model, kv=kv)
    cache = eff.kv_cache(model, capacity=96)
    found = steps(model, ids, cache, parts)
    error, scale = (found - wanted).abs(), wanted.abs().max()
    assert float(error[:, :50].max()) < 1e-5 * float(scale)
    assert float(error.max()) < off * float(scale)
    if kv == "int8-per-token":
        assert float(error.max()) > 1e-4 * float(scale)  # the old tokens are read from the packed cache
    (site, _) = (layer.site for layer in cache.packed)
    assert (site.layout, site.kv_heads, site.head_dim, site.value_dim) == ("mla", 1, 48, 16)
    codes = 4 if kv == "plain" else 1
    scales = 0 if kv == "plain" else 2 * 2
    assert cache.nbytes() == 2 * (2 * 96 * ((48 + 16) * codes + scales) + 8)


RELATIVES = ("AXK1", "Glm4MoeLite", "LongcatFlash", "MiniCPM3", "Mistral4", "Youtu")
"""Those that expand latents as DeepSeek-V3 does; DeepSeek-V3.2 has an indexer beside them, whose layers are refused by name."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", RELATIVES)
def test_relatives_say_what_they_say_with_their_own_cache(kind: str) -> None:
    import transformers

    experts = {"n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    sizes = {"hidden_size": 64, "num_layers": 2, "q_lora_rank": 24, "moe_intermediate_size": 32}
    longcat = {"expert_ffn_hidden_size": 32, "ffn_hidden_size": 64, "moe_topk": 2, "zero_expert_num": 1, "head_dim": 16}
    fields = {**LLAMA, **HEADS, **SIZES, **experts, **sizes, **(longcat if kind == "LongcatFlash" else {})}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**fields)).eval()
    ids = words(2, 30)
    with torch.no_grad():
        wanted = model(ids).logits
    eff.prepare(model, kv="plain")
    cache = eff.kv_cache(model, capacity=32)
    found = steps(model, ids, cache, (20, *[1] * 10))
    assert {layer.site.layout for layer in cache.packed} == {"mla"}
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_greedy_tokens_are_those_of_the_model() -> None:
    model = latents()
    ids = words(3, 30)
    given = {"max_new_tokens": 40, "do_sample": False}
    wanted = model.generate(ids, **given)
    eff.prepare(model, kv="int8-per-token")
    found = model.generate(ids, return_dict_in_generate=True, **given)
    assert type(found.past_key_values).__name__ == "PackedCache"
    assert torch.equal(found.sequences, wanted)
    eff.prepare(model)
    assert torch.equal(model.generate(ids, **given), wanted)


def test_left_padding_beams_and_cuts() -> None:
    model = latents()
    ids, mask = words(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[0, :9] = 0
    ids[0, :9] = 0
    given = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": 3}
    wanted = model.generate(ids, **given)
    eff.prepare(model, kv="plain")
    assert torch.equal(model.generate(ids, **given), wanted)
    cache = eff.kv_cache(model)
    whole = steps(model, ids[1:], cache, (20, 4))
    cache.crop(-4)
    assert cache.get_seq_length() == 20
    again = steps(model, torch.cat([ids[1:, :20], ids[1:, 20:]], 1)[:, 20:], cache, (1, 1, 1, 1))
    torch.testing.assert_close(again, whole[:, 20:], rtol=1e-4, atol=1e-4)


def test_a_capacity_that_is_exceeded_is_an_error_before_anything_is_written() -> None:
    model = eff.prepare(latents(), kv="int8-per-token")
    cache = eff.kv_cache(model, capacity=8)
    steps(model, words(1, 8), cache, (8,))
    before = {name: x.clone() for name, x in cache.packed[0].state.items()}
    with pytest.raises(EffError, match="EFF-K201"), torch.no_grad():
        model(words(1, 1), past_key_values=cache, use_cache=True)
    assert all(torch.equal(x, before[name]) for name, x in cache.packed[0].state.items())


def test_one_compiled_graph_serves_all_steps_and_shows_the_sites() -> None:
    model = eff.prepare(latents(num_hidden_layers=1), kv="int8-per-token")
    ids = words(1, 30)
    wanted = steps(model, ids, eff.kv_cache(model, capacity=64), (20, *[1] * 10))
    cache = eff.kv_cache(model, capacity=64, batch=1)
    fast = torch.compile(model, backend="eff", dynamic=False, options={"strict": True, "emit": "interpreter"})
    steps(model, ids, cache, (20,))
    with torch.no_grad():
        first = fast(ids[:, 20:21], past_key_values=cache, use_cache=True).logits
        with torch.compiler.set_stance("fail_on_recompile"):
            more = [fast(ids[:, n : n + 1], past_key_values=cache, use_cache=True).logits for n in range(21, 30)]
    found = torch.cat([first, *more], 1)
    assert float((found - wanted[:, 20:]).abs().max()) < 1e-4 * float(wanted.abs().max())
    caches = [row for graph in eff.report()["graphs"] for row in graph["caches"]][-1:]
    assert {row["layout"] for row in caches} == {"mla"}
    assert {row["format"] for row in caches} == {"int8-per-token"}


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"kv": "kivi"}, "EFF-K204"),
        ({"kv": "two-plane"}, "EFF-K204"),
        ({"kv": "zipvl-mixed"}, "EFF-K206"),
        ({"evict": "snapkv"}, "EFF-K206"),
        ({"kv": "int8-per-token", "attention": "quest{page=64}"}, "EFF-K206"),
    ],
)
def test_what_chooses_among_keys_is_refused(asked: dict[str, str], code: str) -> None:
    with pytest.raises(EffError, match=rf"(?s){code}.*latents"):
        eff.prepare(latents(), **asked)


def test_a_layer_that_expands_by_more_than_its_weight_is_refused() -> None:
    other = latents()
    for layer in other.model.layers:
        own = layer.self_attn.expand_kv
        layer.self_attn.__dict__["expand_kv"] = lambda latent, rotated, own=own: tuple(
            2 * x for x in own(latent, rotated)
        )
    with pytest.raises(EffError, match=r"EFF-K205.*by more than"):
        eff.prepare(other, kv="int8-per-token")
    wrapped = eff.prepare(latents(), kv="int8-per-token")
    cache = eff.kv_cache(wrapped)
    steps(wrapped, words(1, 4), cache, (4,))
    attention = wrapped.model.layers[0].self_attn
    attention.kv_b_proj = nn.Sequential(attention.kv_b_proj, nn.Identity())  # as an adapter would
    with pytest.raises(EffError, match=r"EFF-K205.*Sequential"), torch.no_grad():
        wrapped(words(1, 1), past_key_values=cache, use_cache=True)


def test_a_copy_of_a_prepared_model_reads_its_own_weights() -> None:
    model = eff.prepare(latents(), kv="int8-per-token")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.kv_b_proj.weight.zero_()
    ids = words(1, 6)
    with torch.no_grad():
        wanted, found = model(ids).logits, other(ids).logits
    assert not torch.allclose(wanted, found)
    own = other.model.layers[0].self_attn
    assert own.expand_kv.args[0].__self__ is own
