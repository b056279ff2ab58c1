"""Check steps that read some pages of a cache: which ones, that the others are not read, and that all pages are everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import effcompile as eff
from effcompile import ops
from effcompile.core.cache import CacheFormat
from effcompile.core.errors import EffError
from effcompile.core.site import CacheSite
from effcompile.passes.kv.int8_per_token import Int8PerToken
from effcompile.passes.kv.kivi import Kivi
from effcompile.passes.kv.plain import Plain
from effcompile.runtime.kv_cache import LayerCache
from effcompile.runtime.paged import PagedCache, Reading
from tests.integrations.test_prepare import llama, steps, words
from tests.support.caches import draw, exact

ops.register()
SITE = CacheSite("layers.2.cache", "cache", "decode", "", kv_heads=2, capacity=1024)
FORMATS: dict[str, CacheFormat] = {"plain": Plain(), "int8": Int8PerToken(), "kivi": Kivi(residual=64)}


def filled(form: CacheFormat, bound: bool, budget: int, count: int = 700) -> tuple[PagedCache, Tensor, Tensor, Tensor]:
    cache = PagedCache(form, SITE, Reading(budget, 64, bound, "quest"))
    k, v = (draw(2, 2, count, 64, dtype=torch.float32, seed=seed).contiguous() for seed in (1, 2))
    cache.append(k[:, :, : count - 3], v[:, :, : count - 3])
    for n in range(count - 3, count):
        cache.append(k[:, :, n : n + 1], v[:, :, n : n + 1])
    return cache, k, v, draw(2, 4, 1, 64, dtype=torch.float32, seed=3)


def test_summaries_are_those_of_all_keys() -> None:
    """The bound is never below the largest score of a page, and tokens that come one by one leave what a prompt leaves."""
    cache, k, _, q = filled(Plain(), True, 256)
    whole, *_ = filled(Plain(), True, 256)
    pages = k.split(64, 2)
    for n, page in enumerate(pages):
        assert torch.equal(cache.state["page_least"][:, :, n], page.amin(2))
        assert torch.equal(cache.state["page_most"][:, :, n], page.amax(2))
    least, most = (whole.state[name].nan_to_num(0, 0, 0) for name in ("page_least", "page_most"))
    heads = q.unflatten(1, (2, 2))[:, :, :, 0]
    bound = heads.clamp(min=0) @ most.transpose(2, 3) + heads.clamp(max=0) @ least.transpose(2, 3)
    true = torch.stack([(heads @ page.transpose(2, 3)).amax(3) for page in pages], 3)
    assert bool((bound[..., : len(pages)] >= true - 1e-4).all())
    means, *_ = filled(Plain(), False, 256)
    assert torch.allclose(means.state["page_sum"][:, :, 3] / 64, pages[3].mean(2), atol=1e-5)


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_a_step_reads_the_pages_with_the_best_scores(name: str, bound: bool, masked: bool) -> None:
    cache, k, v, q = filled(FORMATS[name], bound, 256)
    mask = None
    if masked:  # left padding of more than a page
        mask = torch.ones(2, 1, 1, cache.capacity, dtype=torch.bool)
        mask[0, :, :, :100] = False
    chosen = cache.chosen(q, mask, 4)
    assert bool((chosen.sum(2) == 4).all())
    first = torch.tensor([1 if masked else 0, 0])
    for b in range(2):
        assert bool(chosen[b, :, [int(first[b]), 9, 10]].all())  # the first one that is seen, and the last two
        assert not masked or b == 1 or not bool(chosen[0, :, 0].any())
    heads = q.unflatten(1, (2, 2))[:, :, :, 0]
    if bound:
        pages = [
            (heads.clamp(min=0) @ p.amax(2)[..., None] + heads.clamp(max=0) @ p.amin(2)[..., None])
            for p in k.split(64, 2)
        ]
        scores = torch.cat(pages, 3).amax(2)
    else:
        scores = torch.stack([(heads.mean(2) * p.mean(2)).sum(2) for p in k.split(64, 2)], 2)
    for b in range(2):
        free = list(range(int(first[b]) + 1, 9))
        for head in range(2):
            best = free[int(scores[b, head, free].argmax())]
            assert bool(chosen[b, head, best])
    out, lse = cache.attend(q, k[:, :, -1:], v[:, :, -1:], mask, False, 0.1)
    keys, values = cache.read(0, 699)
    keys, values = torch.cat([keys, k[:, :, -1:]], 2), torch.cat([values, v[:, :, -1:]], 2)
    kept = chosen.repeat_interleave(64, 2)[..., :700].repeat_interleave(2, 1)[:, :, None]
    kept = kept if mask is None else kept & mask[..., :700]
    wanted, norm = exact(q, keys, values, kept, False, 0.1)
    assert float((out.double() - wanted).abs().max()) < 1e-4
    assert float((lse.double() - norm).abs().max()) < 1e-4


@pytest.mark.parametrize("name", ["int8", "kivi"])
def test_other_pages_are_not_read(name: str) -> None:
    """What lies in them may be anything, and changes no bit."""
    cache, k, v, q = filled(FORMATS[name], True, 256)
    before = cache.attend(q, k[:, :, -1:], v[:, :, -1:], None, False, 0.1)
    chosen = cache.chosen(q, None, 4)
    (other,) = [n for n in range(10) if not bool(chosen[:, :, n].any())][:1]
    scales = cache.state["k_scales"]
    if name == "int8":
        scales[:, :, other * 64 : other * 64 + 64] = torch.nan
    else:
        scales[:, :, other * 2 : other * 2 + 2] = torch.nan
    after = cache.attend(q, k[:, :, -1:], v[:, :, -1:], None, False, 0.1)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_all_pages_are_everything_and_a_cut_forgets() -> None:
    cache, k, v, q = filled(Int8PerToken(), True, 1024)
    plain = LayerCache(Int8PerToken(), SITE)
    plain.append(k, v)
    given: tuple[Any, ...] = (q, k[:, :, -1:], v[:, :, -1:], None, False, 0.1)
    assert torch.equal(cache.attend(*given)[0], plain.attend(*given)[0])
    cache, k, v, q = filled(Int8PerToken(), True, 256)
    cache.crop(330)
    assert bool((cache.state["page_most"][:, :, 6:] == -torch.inf).all())
    assert not bool(cache.chosen(q, None, 4)[:, :, 6:].any())
    cache.reset()
    cache.append(k[:, :, :70], v[:, :, :70])
    assert torch.equal(cache.state["page_least"][:, :, 1], k[:, :, 64:70].amin(2))


def test_a_model_reads_pages_in_one_compiled_graph() -> None:
    """With pages for all tokens it says what it says without; with fewer, compiled and eager code agree."""
    model, ids = llama(), words(2, 300)
    parts = (280, *[1] * 10)
    wide, some = "quest{budget=512,page=64,dense_layers=0}", "block-topk{budget=192,page=64,dense_layers=1}"
    eff.prepare(model, kv="int8-per-token", capacity=512)
    wanted = steps(model, ids, eff.kv_cache(model), parts)
    assert torch.equal(steps(model, ids, eff.kv_cache(model, "int8-per-token", attention=wide), parts), wanted)
    eff.prepare(model, kv="int8-per-token", attention=some, capacity=512)
    caches = [eff.kv_cache(model) for _ in range(2)]
    assert [type(layer).__name__ for layer in caches[0].packed] == ["LayerCache", "PagedCache"]
    eager = steps(model, ids, caches[0], parts)
    with torch.no_grad():
        model(ids[:, :280], past_key_values=caches[1], use_cache=True)
        call = torch.compile(model, backend="eff", dynamic=False, options={"strict": True})
        for n in range(280, 290):
            found = call(ids[:, n : n + 1], past_key_values=caches[1], use_cache=True).logits
            assert float((found - eager[:, n : n + 1]).abs().max()) < 1e-3
    assert eff.report()["counters"]["graphs"] == 1
    assert model.generate(ids[:, :100], max_new_tokens=3, do_sample=False).shape == (2, 103)


@pytest.mark.parametrize(
    "given",
    [
        {"kv": "zipvl-mixed", "attention": "quest{page=64}"},
        {"evict": "sink-window", "attention": "quest{page=64}"},
        {"attention": "quest"},
        {"attention": "sink-window"},
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(EffError, match="EFF-K206"):
        eff.prepare(llama(), **given)
