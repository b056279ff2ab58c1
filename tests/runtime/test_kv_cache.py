"""Check what a layer's cache does with its tokens: cut, forget, reorder, grow, and count its bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from effcompile import ops
from effcompile.core.cache import CacheFormat
from effcompile.core.errors import EffError
from effcompile.core.ranges import Ranges
from effcompile.core.site import CacheSite
from effcompile.passes.kv.fp8 import Fp8
from effcompile.passes.kv.int8_per_token import Int8PerToken
from effcompile.passes.kv.kivi import Kivi
from effcompile.passes.kv.plain import Plain
from effcompile.passes.kv.static_channel import StaticChannel
from effcompile.passes.kv.two_plane import TwoPlane
from effcompile.runtime.kv_cache import LayerCache
from tests.support.caches import draw, exact

ops.register()


class Measured(StaticChannel):
    """Have scales without a file of them."""

    def constants(self, site: CacheSite) -> dict[str, Tensor]:
        """Return scales that reach what `draw` makes."""
        return {name: torch.full((2, 64), 30 / (2 ** (self.bits - 1) - 1)) for name in ("k_scales", "v_scales")}


FORMATS: dict[str, CacheFormat] = {
    "plain": Plain(),
    "int8": Int8PerToken(),
    "fp8": Fp8(),
    "kivi-4": Kivi(residual=64),
    "kivi-2": Kivi(bits=2, group=64, residual=64),
    "static-4": Measured(bits=4),
    "two-plane": TwoPlane(theta=2.0, stale=True),
}


def cache_of(name: str, capacity: int = 0) -> LayerCache:
    return LayerCache(
        FORMATS[name],
        CacheSite("layers.0.cache", "cache", "decode", "", kv_heads=2, capacity=capacity, dtype="float32"),
    )


def tokens(count: int, seed: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    k, v = (draw(batch, 2, count, 64, dtype=torch.float32, seed=2 * seed + odd) for odd in (0, 1))
    return k, v


def same(cache: LayerCache, other: LayerCache) -> None:
    assert cache.length == other.length
    for first, second in zip(cache.read(), other.read()):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("left", [0, 1, 31, 32, 63, 64, 65, 100, 199, 200])
def test_a_cut_forgets_the_last_tokens_only(name: str, left: int) -> None:
    """What stays is read as before, and what comes after it has a past of `left` tokens."""
    cache = cache_of(name, 300)
    cache.append(*tokens(200, 0))
    before = cache.read(0, left)
    cache.crop(left)
    for first, second in zip(cache.read(), before):
        assert torch.equal(first, second)
    for seed in range(1, 5):
        k, v = tokens(40 if seed == 2 else 1, seed)
        cache.append(k, v)
    assert cache.length == left + 43
    q = draw(2, 4, 1, 64, dtype=torch.float32, seed=9)
    out, _ = cache.attend(q, k, v, None, False, 0.1)
    keys, values = cache.read(0, cache.length - 1)
    wanted, _ = exact(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), None, False, 0.1)
    assert float((out.double() - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_rollback_within_the_residual_leaves_no_trace(name: str) -> None:
    """Tokens that a draft model proposed and the model refused: after the rollback the bits are those of a cache without them."""
    cache, other = cache_of(name, 300), cache_of(name, 300)
    for each in (cache, other):
        each.append(*tokens(40, 0))
    cache.append(*tokens(8, 1))
    cache.crop(40)
    for each in (cache, other):
        each.append(*tokens(150, 2))
    same(cache, other)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_reset_forgets_all_and_moves_nothing(name: str) -> None:
    cache, other = cache_of(name, 300), cache_of(name, 300)
    cache.append(*tokens(250, 0))
    places = {part: tensor.data_ptr() for part, tensor in cache.state.items()}
    cache.reset()
    assert cache.length == 0
    for each in (cache, other):
        each.append(*tokens(90, 1))
    same(cache, other)
    assert places == {part: tensor.data_ptr() for part, tensor in cache.state.items()}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_sequences_are_reordered_and_repeated(name: str) -> None:
    cache = cache_of(name, 200)
    cache.append(*tokens(150, 0, batch=3))
    keys, values = cache.read()
    first = next(iter(cache.state))
    places = cache.state[first].data_ptr()
    cache.select(torch.tensor([2, 0, 0]))
    assert cache.state[first].data_ptr() == places, "compiled code writes there"
    assert torch.equal(cache.read()[0], keys[[2, 0, 0]])
    cache.select(torch.tensor([0, 0, 1, 1]))
    assert torch.equal(cache.read()[1], values[[2, 2, 0, 0]])
    cache.append(*tokens(20, 1, batch=4))
    assert cache.length == 170


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_cache_without_capacity_grows_and_keeps_every_token(name: str) -> None:
    cache, other = cache_of(name), cache_of(name, 1300)
    for seed, count in enumerate((3, 300, 1, 500, 1, 400)):
        for each in (cache, other):
            each.append(*tokens(count, seed))
    assert cache.capacity < 2700
    same(cache, other)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_fixed_cache_refuses_what_it_cannot_hold(name: str) -> None:
    cache = cache_of(name, 128)
    cache.append(*tokens(120, 0))
    before = cache.read()
    with pytest.raises(EffError, match="EFF-K201"):
        cache.append(*tokens(9, 1))
    assert cache.length == 120
    for first, second in zip(cache.read(), before):
        assert torch.equal(first, second)
    for wrong in (121, -1):
        with pytest.raises(EffError, match="EFF-K203"):
            cache.crop(wrong)


@pytest.mark.parametrize(
    ("form", "most"),
    [
        (Int8PerToken(), 0.55),
        (Fp8(), 0.55),
        (Kivi(bits=4), 0.34),
        (Kivi(bits=2), 0.22),
        (Kivi(bits=4, group=64), 0.30),
        (TwoPlane(), 0.65),
    ],
)
def test_bytes_against_bfloat16_at_8k(form: CacheFormat, most: float) -> None:
    """Scales in half precision and a residual of 128 tokens in bfloat16 are counted."""
    cache = LayerCache(form, CacheSite("c", "cache", "decode", "", kv_heads=3, capacity=8192))
    cache.prepare(*(torch.zeros(1, 3, 0, 64, dtype=torch.bfloat16) for _ in range(2)))
    assert cache.nbytes() == sum(x.untyped_storage().nbytes() for x in cache.state.values())
    assert cache.nbytes() <= most * 2 * 3 * 8192 * 64 * 2
    assert cache.capacity == 8192


def test_formats_refuse_what_they_cannot_do() -> None:
    for fields in (
        {"bits": 3},
        {"group": 16},
        {"group": 48},
        {"residual": 16},
        {"residual": 100},
        {"group": 64, "residual": 32},
    ):
        with pytest.raises(EffError, match="EFF-U004"):
            Kivi(**fields)
    with pytest.raises(EffError, match=r"EFF-K204.*80"):
        LayerCache(Kivi(), CacheSite("layers.0.cache", "cache", "decode", "", head_dim=80, value_dim=64, capacity=64))
    assert LayerCache(Int8PerToken(), CacheSite("c", "cache", "decode", "", head_dim=80, value_dim=33)).length == 0


def test_ranges_are_those_of_the_model(tmp_path: Path) -> None:
    """A file of another model, of none, or none at all is refused before anything runs."""
    site = CacheSite("layers.1.cache", "cache", "decode", "", kv_heads=2, head_dim=64, value_dim=32, capacity=8)
    file = tmp_path / "kv.json"
    k, v = torch.rand(2, 64), torch.rand(2, 32)
    k[0, 3] = 0
    Ranges({1: (k, v)}).save(file)
    layer = LayerCache(StaticChannel(bits=4, ranges=str(file)), site)
    layer.append(torch.zeros(1, 2, 1, 64), torch.zeros(1, 2, 1, 32))
    assert torch.equal(layer.state["k_scales"], torch.where(k == 0, 1.0, k / 7))
    same_everywhere = LayerCache(StaticChannel(per="tensor", ranges=str(file)), site).constants["v_scales"]
    assert torch.equal(same_everywhere, (v.amax() / 127).expand(2, 32))
    Ranges({1: (k.fill_(float("inf")), v)}).save(file)
    bad = [StaticChannel(), StaticChannel(ranges=str(tmp_path / "none.json")), StaticChannel(ranges=str(file))]
    for form in bad:
        with pytest.raises(EffError, match="EFF-K207"):
            LayerCache(form, site)
    Ranges({1: (v, v), 0: (k, v)}).save(file)
    with pytest.raises(EffError, match=r"EFF-K207.*2 heads of 64/32"):
        LayerCache(bad[2], site)
    file.write_text("{}")
    with pytest.raises(EffError, match="EFF-K207"):
        LayerCache(bad[2], site)
    with pytest.raises(EffError, match=r"EFF-K204.*33"):
        LayerCache(bad[2], replace(site, head_dim=33))
    for fields in ({"bits": 2}, {"per": "token"}):
        with pytest.raises(EffError, match="EFF-U004"):
            StaticChannel(**fields)  # type: ignore[arg-type]
    for fields in ({"theta": -0.1}, {"theta": "much"}, {"stale": 1}):
        with pytest.raises(EffError, match="EFF-U004"):
            TwoPlane(**fields)
    with pytest.raises(EffError, match="EFF-K204"):
        LayerCache(TwoPlane(), replace(site, head_dim=33))
