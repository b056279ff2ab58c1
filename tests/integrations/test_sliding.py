"""Run models with sliding windows on caches that hold those only: calls, padding, generate, beams, rollback, compiled steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import effcompile as eff
from effcompile.core.errors import EffError
from effcompile.runtime.sliding import ROOM, SlidingCache
from tests.integrations.test_prepare import HEADS, LLAMA, sinks, sliding, steps, words

HELD = 8 - 1 + ROOM


def mistral(**fields: Any) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(**{**LLAMA, **HEADS, "sliding_window": 8, "pad_token_id": 0, **fields})
    ).eval()


def gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    fields = {**LLAMA, **HEADS, "sliding_window": 8, "query_pre_attn_scalar": 32, "pad_token_id": 0}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**fields, "num_hidden_layers": 3}, layer_types=kinds)).eval()


MODELS = [mistral, sliding, gemma3, sinks]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("parts", [(60, *[1] * 50), (5, 90, 3, 1, 1)])
def test_windows_say_what_all_tokens_say(make: Any, parts: tuple[int, ...]) -> None:
    """A prompt and chunks longer than the window, and steps over several of them."""
    from transformers import DynamicCache

    model, ids = make(), words(2, sum(parts))
    model.set_attn_implementation("eager")
    wanted = steps(model, ids, DynamicCache(config=model.config), parts)
    eff.prepare(model, kv="plain")
    cache, fixed = eff.kv_cache(model), eff.kv_cache(model, capacity=128)
    for each in (cache, fixed):
        found = steps(model, ids, each, parts)
        assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
        held = [layer for layer in each.packed if isinstance(layer, SlidingCache)]
        assert len(held) == sum(layer.site.window > 0 for layer in each.packed) > 0
        assert {layer.length for layer in held} == {HELD}
        assert {layer.seen for layer in each.packed} == {sum(parts)}
    assert cache.evicted == 0
    assert f"with a window of 8, plain: {sum(parts)} tokens seen" in repr(cache)
    size = 2 * 2 * 2 * 32 * 4  # keys and values, two sequences, two heads of 32 floats
    for layer in fixed.packed:
        places = HELD if isinstance(layer, SlidingCache) else 128
        assert 0 <= layer.nbytes() - size * places < 2 * 2 * 4 * places + 100  # and where each token stands


@pytest.mark.parametrize("make", [mistral, gemma3])
@pytest.mark.parametrize("kv", ["plain", "int8-per-token"])
def test_a_padded_sequence_says_what_it_says_alone(make: Any, kv: str) -> None:
    model = eff.prepare(make(), kv=kv)
    ids = words(2, 70)
    ids[0, :25] = 0
    given = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    both = model.generate(ids, attention_mask=(ids != 0).long(), **given)
    assert torch.equal(both[1:], model.generate(ids[1:], **given))
    assert torch.equal(both[:1, 25:], model.generate(ids[:1, 25:], **given))


@pytest.mark.parametrize("extra", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}])
def test_generate_gives_the_tokens_of_the_models_own_cache(extra: dict[str, Any]) -> None:
    """Beams reorder windows; looked-up tokens are taken back."""
    model = gemma3()
    ids = words(1, 12).repeat(1, 5)
    found = []
    for kv in (None, "plain"):
        eff.prepare(model, kv=kv)
        found.append(model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False, **extra))
    assert torch.equal(*found)


def test_a_cut_is_one_for_all_layers_or_none() -> None:
    model = eff.prepare(gemma3(), kv="plain")
    ids = words(1, 110)
    cache, other = eff.kv_cache(model), eff.kv_cache(model)
    steps(model, ids, cache, (100,))
    with pytest.raises(EffError, match=r"EFF-K203.*layers\.0.*window of 8"):
        cache.crop(-ROOM - 1)
    assert {layer.seen for layer in cache.packed} == {100}
    cache.crop(-ROOM)
    steps(model, ids, other, (100 - ROOM,))
    found, wanted = (steps(model, words(1, 40, 1), each, (1,) * 40) for each in (cache, other))
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_pages_and_evictions_beside_windows() -> None:
    """Pages of what a window shows are all read; an eviction decides in every layer, as it is asked to."""
    model = eff.prepare(gemma3(), kv="plain", attention="quest{page=64,budget=64,dense_layers=0}")
    kinds = [type(layer).__name__ for layer in eff.kv_cache(model).packed]
    assert kinds == ["SlidingCache", "PagedCache", "SlidingCache"]
    model = eff.prepare(mistral(sliding_window=100), kv="plain", attention="quest{page=64,budget=64,dense_layers=0}")
    assert [type(layer).__name__ for layer in eff.kv_cache(model).packed] == ["PagedCache"] * 2
    model = eff.prepare(gemma3(), evict="sink-window{window=20,sinks=2}")
    assert {type(layer).__name__ for layer in eff.kv_cache(model).packed} == {"EvictingCache"}
    assert {type(layer).__name__ for layer in eff.kv_cache(gemma3(), "plain", capacity=30).packed} == {"LayerCache"}


@pytest.mark.parametrize(
    ("kv", "emit"),
    [
        ("plain", "interpreter"),
        pytest.param("plain", "inductor", marks=pytest.mark.slow),
        pytest.param("kivi{residual=32}", "interpreter", marks=pytest.mark.slow),
        pytest.param("int8-per-token", "inductor", marks=pytest.mark.slow),
    ],
)
def test_one_compiled_graph_serves_every_step(kv: str, emit: str) -> None:
    model = eff.prepare(gemma3(), kv=kv, capacity=200)
    ids = words(2, 150)
    caches = [eff.kv_cache(model) for _ in range(2)]
    call = torch.compile(model, backend="eff", dynamic=False, options={"strict": True, "emit": emit})
    for cache in caches:
        steps(model, ids[:, :30], cache, (30,))
    found = steps(call, ids[:, 30:], caches[0], (1,) * 120)
    wanted = steps(model, ids[:, 30:], caches[1], (1,) * 120)
    near = 1e-2 if kv == "int8-per-token" else 1e-4  # a code may be the next one where sums are in another order
    assert float((found - wanted).abs().max()) < near * float(wanted.abs().max())
    report = eff.report()
    assert report["counters"] == {"graphs": 1, "sites": 0, "missed": 0, "caches": 3}
    assert [cache["window"] for cache in report["graphs"][0]["caches"]] == [8, 0, 8]
    more = words(2, 4, 1)  # a few tokens at once, such as those that a draft model proposes
    found, wanted = steps(call, more, caches[0], (4,)), steps(model, more, caches[1], (4,))
    assert float((found - wanted).abs().max()) < near * float(wanted.abs().max())
    if kv == "plain":
        before = [x.clone() for layer in caches[0].packed for x in layer.state.values()]
        with pytest.raises(EffError, match=r"EFF-K206.*sliding window"):
            steps(call, words(2, 33), caches[0], (33,))
        assert all(map(torch.equal, before, (x for layer in caches[0].packed for x in layer.state.values())))
