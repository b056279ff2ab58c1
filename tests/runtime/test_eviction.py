"""Check what a cache with an eviction reads, and what it does with its past."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from effcompile import ops
from effcompile.core.errors import EffError
from effcompile.core.eviction import CacheEviction
from effcompile.ops.kv import scores
from effcompile.passes.kv.expected_attention import ExpectedAttention
from effcompile.passes.kv.keyformer import Keyformer
from effcompile.passes.kv.sink_window import SinkWindow
from effcompile.passes.kv.snapkv import SnapKV
from effcompile.runtime.eviction import EvictingCache
from tests.support.caches import exact
from tests.support.evictions import FORMATS, POLICIES, SCALE, cache_of, feed, kept, padded_mask, parts, tokens

ops.register()


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("pad", [None, [0, 37]])
def test_attention_reads_the_held_tokens_and_those_of_the_call(name: str, policy: str, pad: list[int] | None) -> None:
    """In a prompt, in steps, in a few tokens at a time, and in another prompt; tokens are those that `positions` names."""
    sizes = [100, 1, 1, 3, *[1] * 35, 60, 1]
    total = sum(sizes)
    given = tokens(total, 1)
    cache, start = cache_of(POLICIES[policy], name, total), 0
    for q, k, v in parts(given, sizes):
        count = q.shape[2]
        mask = None if pad is None else padded_mask(pad, start, count, total)
        if start and count > 1 and mask is None:
            mask = padded_mask([0, 0], start, count, total)
        held = cache.length
        if held:
            own = cache.state["positions"][:, :, :held].long()
            assert bool((own.sort(-1).values.diff(dim=-1) > 0).all()), "a token is held twice"
            keys, values = cache.read()
            if name == "plain":
                for found, true in zip((keys, values), given[1:]):
                    assert torch.equal(found, true.gather(2, own[..., None].expand_as(found)))
        else:
            own, keys, values = torch.zeros(2, 2, 0, dtype=torch.int64), k[:, :, :0], v[:, :, :0]
        fresh = torch.arange(start, start + count).expand(2, 2, -1)
        places = torch.cat([own, fresh], 2).repeat_interleave(2, 1)[:, :, None].expand(-1, -1, count, -1)
        seen = padded_mask(pad or [0, 0], start, count, total).expand(-1, 4, -1, -1).gather(3, places)
        wanted, norm = exact(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), seen, False, SCALE)
        out, lse = feed(cache, q, k, v, mask)
        assert float((out.double() - wanted).abs().max()) < 1e-4
        assert torch.equal(lse == -math.inf, norm == -math.inf)
        start += count
        assert cache.seen == start
        assert cache.evicted == start - cache.length > (0 if start > 60 else -1)


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize(
    "policy",
    [
        SinkWindow(window=500),
        SnapKV(budget=200),
        ExpectedAttention(keep=1.0),
        Keyformer(keep=1.0),
        Keyformer(least=200),
    ],
    ids=lambda policy: policy.spelled,
)
def test_what_fits_the_budget_is_all_held(name: str, policy: CacheEviction) -> None:
    given = tokens(150, 2)
    cache = cache_of(policy, name)
    for part in parts(given, [90, *[1] * 30, 30]):
        mask = None
        if cache.seen and part[0].shape[2] > 1:
            mask = padded_mask([0, 0], cache.seen, part[0].shape[2], cache.seen + part[0].shape[2])
        feed(cache, *part, mask)  # type: ignore[arg-type]
    assert cache.evicted == 0
    assert torch.equal(kept(cache), torch.arange(150).expand(2, 2, -1))


@pytest.mark.parametrize("policy", [SinkWindow(window=100, sinks=3), Keyformer(keep=0.5, least=100)])
def test_a_cache_in_groups_drops_groups_and_rounds_nothing_twice(policy: CacheEviction) -> None:
    """What is held of the prompt reads bit for bit as it did when it was packed."""
    cache, given = cache_of(policy, "kivi"), tokens(500, 6)
    keys: dict[tuple[int, int, int], Tensor] = {}
    for part in parts(given, [200, *[1] * 300]):
        feed(cache, *part)  # type: ignore[arg-type]
        packed, own = int(cache.state["packed"]), cache.state["positions"]
        read = cache.read(0, packed)[0]
        assert cache.length < 103 + 61 + 32
        for b, g, j in [(0, 0, 0), (1, 1, packed // 2), (0, 1, packed - 1)]:
            place = (b, g, int(own[b, g, j]))
            assert torch.equal(keys.setdefault(place, read[b, g, j].clone()), read[b, g, j])
    assert cache.evicted > 300
    if isinstance(policy, SinkWindow):
        assert bool((kept(cache)[..., :3] == torch.arange(3)).all())
        assert bool((kept(cache)[..., -100:] == torch.arange(400, 500)).all())


# --- what it depends on ----------------------------------------------------------------------------------------------------------


def run(cache: EvictingCache, given: tuple[Tensor, ...], pad: list[int], prompt: int = 60) -> Tensor:
    total = given[0].shape[2]
    outs = []
    for start, part in zip([0, *range(prompt, total)], parts(given, [prompt, *[1] * (total - prompt)])):  # type: ignore[arg-type]
        outs.append(feed(cache, *part, padded_mask(pad, start, part[0].shape[2], total))[0])  # type: ignore[arg-type]
    return torch.cat(outs, 2)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_sequence_keeps_what_it_keeps_alone(policy: str) -> None:
    """Padding on the left and other sequences change neither what stays nor, beyond rounding, what is read."""
    given = tokens(90, 8)
    both = cache_of(POLICIES[policy])
    found = run(both, given, [0, 25])
    alone = cache_of(POLICIES[policy])
    own = tuple(x[1:, :, 25:] for x in given)
    wanted = run(alone, own, [0], 35)
    if POLICIES[policy].stays(60) == POLICIES[policy].stays(35):
        real = [[j - 25 for j in row if j >= 25] for row in kept(both)[1].tolist()]
        assert real == kept(alone)[0].tolist()
        assert float((found[1:, :, 25:] - wanted).abs().max()) < 1e-4


def test_noise_can_be_repeated_and_follows_the_seed() -> None:
    given = tokens(80, 9)
    outs, sets = [], []
    for seed in (0, 0, 1):
        cache = cache_of(Keyformer(keep=0.5, least=10, seed=seed))
        outs.append(run(cache, given, [0, 0]))
        sets.append(kept(cache))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(sets[0], sets[1])
    assert not torch.equal(sets[0], sets[2])
    rows, columns = torch.arange(2000)[None], torch.arange(300)[None, None].expand(1, 2, -1)
    drawn = scores.gumbel(3, 1, 2, rows, columns)
    assert abs(float(drawn.mean()) - 0.5772) < 0.01
    assert abs(float(drawn.std()) - 1.2825) < 0.01
    assert torch.equal(drawn[:, :, 700:705, 20:40], scores.gumbel(3, 1, 2, rows[:, 700:705], columns[..., 20:40]))
    rows_alike = drawn[0].flatten(0, 1)[:50]
    assert float((torch.corrcoef(rows_alike) - torch.eye(50)).abs().max()) < 0.35


def test_dropped_tokens_leave_no_trace() -> None:
    """Another order of the tokens that SnapKV drops changes nothing that comes after it."""
    policy, given = SnapKV(budget=30, window=6, pool=1), tokens(80, 10, batch=1)
    cache = cache_of(policy)
    first = run(cache, given, [0])
    other = [x.clone() for x in given]
    for g in range(2):
        gone = torch.tensor(sorted(set(range(54)) - set(kept(cache)[0, g].tolist())))
        for x in other[1:]:
            x[0, g, gone] = x[0, g, gone.flip(0)]
    again = cache_of(policy)
    second = run(again, tuple(other), [0])
    assert len(gone) > 20
    assert torch.equal(kept(cache), kept(again))
    assert torch.equal(first[:, :, 60:], second[:, :, 60:])


# --- the past --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_last_tokens_can_be_taken_back(name: str, policy: str) -> None:
    given = tokens(140, 11)
    cache = cache_of(POLICIES[policy], name)
    for part in parts(tuple(x[:, :, :110] for x in given), [80, *[1] * 30]):  # type: ignore[arg-type]
        feed(cache, *part)  # type: ignore[arg-type]
    before, held = kept(cache), cache.length
    cache.crop(107)
    assert cache.seen == 107
    assert torch.equal(kept(cache), before[..., :-3])
    q, k, v = (x[:, :, 107:108] for x in given)
    old, own = cache.read(), cache.state["positions"][:, :, : cache.length].long()
    if name == "plain":
        assert torch.equal(old[0], given[1].gather(2, own[..., None].expand_as(old[0])))
    wanted, _ = exact(q, torch.cat([old[0], k], 2), torch.cat([old[1], v], 2), None, False, SCALE)
    out, _ = feed(cache, q, k, v)
    assert float((out.double() - wanted).abs().max()) < 1e-4
    assert cache.length == held - 2
    if policy in ("snapkv", "keyformer"):
        with pytest.raises(EffError, match="EFF-K203"):
            cache.crop(40)
        assert cache.seen == 108
    cache.crop(0)
    assert (cache.seen, cache.length) == (0, 0)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_sequences_are_reordered_with_what_they_hold(policy: str) -> None:
    given = tokens(100, 12)
    cache, other = cache_of(POLICIES[policy]), cache_of(POLICIES[policy])
    order = torch.tensor([1, 0])
    run(cache, tuple(x[:, :, :90] for x in given), [0, 0])
    run(other, tuple(x[order, :, :90] for x in given), [0, 0])
    cache.select(order)
    for n in range(90, 100):
        found = feed(cache, *(x[order, :, n : n + 1] for x in given))  # type: ignore[misc]
        wanted = feed(other, *(x[order, :, n : n + 1] for x in given))  # type: ignore[misc]
        assert torch.equal(found[0], wanted[0])
    assert torch.equal(kept(cache), kept(other))
    assert set(cache.state) == set(other.state)


def test_reset_begins_anew_in_the_same_place() -> None:
    for policy in POLICIES.values():
        cache, other = cache_of(policy, "int8", 200), cache_of(policy, "int8", 200)
        run(cache, tokens(90, 13), [0, 9])
        places = {name: tensor.data_ptr() for name, tensor in cache.state.items()}
        cache.reset()
        assert torch.equal(run(cache, tokens(80, 14), [0, 0]), run(other, tokens(80, 14), [0, 0]))
        assert torch.equal(kept(cache), kept(other))
        assert places == {name: tensor.data_ptr() for name, tensor in cache.state.items()}


def test_a_context_longer_than_the_cache_was_made_for_is_an_error() -> None:
    for policy in POLICIES.values():
        cache = cache_of(policy, "int8", 90)
        given = tokens(91, 15)
        run(cache, tuple(x[:, :, :90] for x in given), [0, 0])
        before = {name: tensor.clone() for name, tensor in cache.state.items()}
        with pytest.raises(EffError, match=r"EFF-K201.*90 of the 90"):
            feed(cache, *(x[:, :, 90:] for x in given))  # type: ignore[misc]
        assert all(torch.equal(cache.state[name], tensor) for name, tensor in before.items())
        with pytest.raises(EffError, match="EFF-K201"):
            feed(cache_of(policy, "int8", 90), *given)


def test_what_a_policy_cannot_be_is_refused() -> None:
    wrong: list[tuple[type[CacheEviction], dict[str, Any]]] = [
        (SinkWindow, {"window": 0}),
        (SinkWindow, {"sinks": -1}),
        (SnapKV, {"budget": 32}),
        (SnapKV, {"pool": 4}),
        (ExpectedAttention, {"keep": 0.0}),
        (ExpectedAttention, {"least": 4}),
        (Keyformer, {"recent": 1.0}),
        (Keyformer, {"keep": 1.5}),
        (Keyformer, {"noise": 1}),
        (Keyformer, {"hot": 0}),
    ]
    for kind, fields in wrong:
        with pytest.raises(EffError, match="EFF-U004"):
            kind(**fields)


def test_probes_stand_for_all_queries_of_a_prompt() -> None:
    """What they read is counted for as many queries as there are; as many probes as queries are all of them, bit for bit."""
    given = tokens(300, 0)
    whole = cache_of(Keyformer(keep=0.3, least=20, noise=False))
    some = cache_of(Keyformer(keep=0.3, least=20, noise=False, probes=60))
    same = cache_of(Keyformer(keep=0.3, least=20, noise=False, probes=300))
    for cache in (whole, some, same):
        feed(cache, *given)
    assert torch.equal(kept(whole), kept(same))
    assert torch.equal(whole.state["mass"], same.state["mass"])
    first, other = whole.state["mass"][..., : whole.length].sum(2), some.state["mass"][..., : some.length].sum(2)
    assert float((first / other - 1).abs().max()) < 0.1
    shared = (kept(whole)[..., :, None] == kept(some)[..., None, :]).any(-1).float().mean()
    assert 0.7 < float(shared) < 1  # of those that are kept; a random choice would share a third of them
    for _ in range(3):
        feed(some, *(x[:, :, :1] for x in given))
    assert some.length == 90
