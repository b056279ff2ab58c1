"""Check caches that keep tokens in two numbers of bits: every token once, those that are read most with the smaller error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effcompile import ops
from effcompile.core.errors import EffError
from effcompile.core.site import CacheSite
from effcompile.passes.kv.zipvl_mixed import ZipVLMixed
from effcompile.runtime.mixed import MixedCache
from tests.support.caches import draw, exact

ops.register()
FORM = ZipVLMixed(mass=0.6, residual=40, interval=64, recent=16, spread=16)


def cache_of(capacity: int = 0, form: ZipVLMixed = FORM) -> MixedCache:
    return MixedCache(form, CacheSite("layers.0.cache", "cache", "decode", "", kv_heads=2, capacity=capacity))


def call(cache: MixedCache, count: int, seed: int, mask: Tensor | None = None, batch: int = 2) -> tuple[Tensor, ...]:
    q, k, v = (draw(batch, h, count, 64, dtype=torch.float32, seed=9 * seed + h + n) for n, h in enumerate((4, 2, 2)))
    cache.append(k, v)
    out, lse = cache.attend(q, k, v, mask, mask is None and count > 1, 0.1)
    return q, k, v, out, lse


@pytest.mark.parametrize("parts", [(300, *[1] * 70, 30, 1, 90, 1), (1, 1, 50, 200), (30, 5, 1)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("capacity", [0, 512])
def test_attention_is_that_over_what_is_held(parts: tuple[int, ...], masked: bool, capacity: int) -> None:
    """Prompts, steps and the calls between, over both parts and the tokens that are not packed; no token is lost or doubled."""
    cache, seen = cache_of(capacity), 0
    tokens: list[tuple[Tensor, Tensor]] = []
    for number, count in enumerate(parts):
        mask = None
        if masked:
            columns = capacity or seen + count
            mask = torch.rand(2, 1, count, columns, generator=torch.Generator().manual_seed(number)) > 0.3
        old = cache.read() if seen else None
        q, k, v, out, lse = call(cache, count, number, mask)
        tokens.append((k, v))
        keys, values = (k, v) if old is None else (torch.cat([x, y], 2) for x, y in zip(old, (k, v)))
        wanted, norm = exact(q, keys, values, mask, mask is None, 0.1)
        assert float((out.double() - wanted).abs().max()) < 1e-4
        assert float((lse.double() - norm).abs().max()) < 1e-4
        seen += count
        assert cache.length == seen
    state = cache.state
    recent = int(state["length"])
    assert recent < FORM.residual + FORM.interval
    for prefix in ("a_", "b_"):
        assert int(state[f"{prefix}length"]) % FORM.group == 0
    places = (
        torch.cat([state[f"{p}positions"][:, :, : int(state[f"{p}length"])] for p in ("a_", "b_")], 2).sort(-1).values
    )
    assert torch.equal(places, torch.arange(seen - recent, dtype=torch.int32).expand_as(places))
    given = [torch.cat(x, 2) for x in zip(*tokens)]
    for found, x in zip(cache.read(seen - recent), given):
        assert torch.equal(found, x[:, :, seen - recent :])


def test_tokens_that_are_read_get_more_bits() -> None:
    """In a prompt by its probes, among generated tokens by the queries since they came."""
    cache = cache_of(700)
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 2, 400, 64, generator=generator) * 0.1
    v = torch.randn(1, 2, 400, 64, generator=generator)
    loved = torch.arange(5, 300, 9)
    k[:, :, loved, 0] += 40.0
    q = torch.zeros(1, 4, 400, 64)
    q[..., 0] = 1.0
    cache.append(k, v)
    cache.attend(q, k, v, None, True, 1.0)
    state = cache.state
    many = int(state["a_length"])
    assert many == 32  # the group that the 33 tokens come nearest to
    # The first probe reads nothing but the first token, which counts as much as many others.
    assert set(state["a_positions"][0, 0, :many].tolist()) <= {0, *loved.tolist()}
    _keys, values = cache.read(0, 350)
    error = (values - v[:, :, :350])[0, 0].abs().amax(-1)
    chosen = state["a_positions"][0, 0, :many].long()
    assert float(error[chosen].max()) < float(error.max()) / 3
    for n in range(140):
        new = torch.randn(1, 2, 1, 64, generator=generator) * 0.1
        new[..., 0] += 40.0 if n % 8 == 3 else 0.0
        cache.append(new, v[:, :, :1])
        cache.attend(q[:, :, :1], new, v[:, :, :1], None, False, 1.0)
    positions = state["a_positions"][0, 1, many : int(state["a_length"])]
    assert len(positions) % 32 == 0
    share = float(state["share"])
    packed = int(state["a_length"]) + int(state["b_length"])
    assert abs(int(state["a_length"]) - share * packed) <= 32


def test_a_rollback_reaches_what_is_not_packed() -> None:
    cache, other = cache_of(512), cache_of(512)
    for each in (cache, other):
        call(each, 200, 0)
    call(cache, 8, 1)
    cache.crop(200)
    for each in (cache, other):
        call(each, 1, 2)
    for x, y in zip(cache.read(), other.read()):
        assert torch.equal(x, y)
    with pytest.raises(EffError, match="EFF-K203"):
        cache.crop(100)
    for wrong in (-1, 300):
        with pytest.raises(EffError, match="EFF-K203"):
            cache.crop(wrong)
    keys = cache.read()[0]
    cache.select(torch.tensor([1, 0]))
    assert torch.equal(cache.read()[0], keys[[1, 0]])
    cache.crop(0)
    assert cache.length == 0
    call(cache, 100, 3)
    assert cache.length == 100


def test_nothing_is_written_where_there_is_no_place() -> None:
    cache = cache_of(128)
    call(cache, 120, 0)
    before = {name: x.clone() for name, x in cache.state.items()}
    for count, code in ((9, "EFF-K201"), (1, "EFF-K202")):
        with pytest.raises(EffError, match=code):
            call(cache, count, 1, batch=2 if count > 1 else 1)
        assert all(torch.equal(cache.state[name], x) for name, x in before.items())
    call(cache, 8, 1)
    assert cache.length == 128


def test_fields_are_checked() -> None:
    bad: list[dict[str, Any]] = [{"interval": 40}, {"group": 48}, {"mass": 0}, {"residual": -1}, {"floor": 2}]
    for fields in bad:
        with pytest.raises(EffError, match="EFF-U004"):
            ZipVLMixed(**fields)
    with pytest.raises(EffError, match="EFF-K204"):
        MixedCache(FORM, CacheSite("c", "cache", "decode", "", head_dim=80))


def test_bytes_follow_the_share() -> None:
    """All tokens favored is what 4 bits take, with the position of every token and twice a group of slack in either part."""
    for mass, most in ((1.0, 0.38), (0.01, 0.27)):
        cache = cache_of(8192, ZipVLMixed(mass=mass))
        k, v = (draw(1, 2, 1024, 64, dtype=torch.bfloat16, seed=n) for n in (1, 2))
        q = draw(1, 2, 1024, 64, dtype=torch.bfloat16, seed=3)
        cache.append(k, v)
        cache.attend(q, k, v, None, True, 0.1)
        assert cache.nbytes() <= most * 2 * 2 * 8192 * 64 * 2
