"""Check that a cache of a sliding window reads what a cache of all tokens does, in memory that stays constant."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from effcompile import ops
from effcompile.core.errors import EffError
from effcompile.core.site import CacheSite
from effcompile.passes.kv.sink_window import SinkWindow
from effcompile.runtime.sliding import ROOM, SlidingCache
from tests.runtime.test_kv_cache import FORMATS
from tests.support.caches import exact
from tests.support.evictions import SCALE, parts, tokens

ops.register()

WINDOW = 40
SITE = CacheSite("layers.1.cache", "cache", "decode", "", kv_heads=2, window=WINDOW, dtype="float32")


def cache_of(name: str, capacity: int = 0) -> SlidingCache:
    policy = SinkWindow(window=WINDOW - 1 + ROOM, sinks=0)
    return SlidingCache(FORMATS[name], replace(SITE, capacity=capacity), policy)


def band(start: int, count: int, columns: int, pad: tuple[int, ...] = (0, 0)) -> Tensor:
    """Return the mask `[B, 1, count, columns]` of a causal window behind left padding."""
    rows, places = torch.arange(start, start + count)[:, None], torch.arange(columns)
    seen = (places <= rows) & (places > rows - WINDOW)
    return seen & (places >= torch.tensor(pad)[:, None, None])[:, None]


def run(cache: SlidingCache, given: tuple[Tensor, ...], sizes: list[int], pad: tuple[int, ...] = (0, 0)) -> Tensor:
    """Return the outputs of calls of `sizes` tokens."""
    found, start, total = [], cache.seen, given[0].shape[2]
    for q, k, v in parts(tuple(x[:, :, start : start + sum(sizes)] for x in given), sizes):
        cache.append(k, v)
        found.append(cache.attend(q, k, v, band(start, q.shape[2], total, pad), False, SCALE)[0])
        start += q.shape[2]
    return torch.cat(found, 2)


@pytest.mark.parametrize("capacity", [0, 500])
@pytest.mark.parametrize("pad", [(0, 0), (0, 37)])
@pytest.mark.parametrize(
    "sizes", [[100, *[1] * 150, 3, 1], [1] * 120, [20, 60, 90, 1, 130, 1, 33, 5, 1, 1], [300, 1, 1]]
)
def test_a_window_is_all_that_a_layer_needs(sizes: list[int], pad: tuple[int, ...], capacity: int) -> None:
    """Prompts and chunks longer than the window, steps over several windows, padding of a sequence: as over all tokens."""
    total = sum(sizes)
    given = tokens(total, 3)
    cache = cache_of("plain", capacity)
    found = run(cache, given, sizes, pad)
    wanted, _ = exact(*given, band(0, total, total, pad).expand(-1, 4, -1, -1), False, SCALE)
    assert float((found.double() - wanted).abs().max()) < 1e-4
    assert cache.seen == total
    assert cache.length <= WINDOW - 1 + ROOM < total
    keys, values = cache.read()
    assert torch.equal(keys, given[1][:, :, total - cache.length :])
    assert torch.equal(values, given[2][:, :, total - cache.length :])


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"plain"}))
@pytest.mark.parametrize("sizes", [[100, *[1] * 200, 3, 1], [20, 60, 90, 1, 130, 1, 33, 5, 1, 1, 70]])
def test_packed_windows_read_what_they_hold_and_stay_small(name: str, sizes: list[int]) -> None:
    """No token of a window is missing, and none is packed anew: a cache of all tokens gives the same numbers."""
    total = sum(sizes)
    given = tokens(total, 4)
    cache, start, most = cache_of(name), 0, 0
    for q, k, v in parts(given, sizes):
        count, held = q.shape[2], cache.length
        packed = int(cache.state["packed"]) if held and "kivi" in name else held  # the others are packed some time
        old = cache.read() if held else (k[:, :, :0], v[:, :, :0])
        assert held >= min(start, WINDOW - 1 + ROOM)
        seen = band(start, count, total)[..., start - held : start + count].expand(-1, 4, -1, -1)
        wanted, norm = exact(q, torch.cat([old[0], k], 2), torch.cat([old[1], v], 2), seen, False, SCALE)
        cache.append(k, v)
        out, lse = cache.attend(q, k, v, band(start, count, total), False, SCALE)
        assert float((out.double() - wanted).abs().max()) < 1e-4
        assert float((lse.double() - norm).abs().max()) < 1e-4
        start += count
        same = packed - (held + count - cache.length)  # those of them that are held still, the first in the cache
        if same > 0:
            assert torch.equal(cache.read()[0][:, :, :same], old[0][:, :, packed - same : packed]), "packed twice"
        most = max(most, cache.nbytes())
    assert cache.seen == total
    assert cache.shape is not None
    assert cache.shape.capacity <= cache.most < total
    assert most == cache.nbytes()


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("before", [50, 71, 72, 150, 163])
def test_taken_back_tokens_leave_no_trace(name: str, before: int) -> None:
    """After a rollback, steps and small chunks give what they give without the tokens that were taken back; none was packed."""
    given, other = tokens(260, 5), tokens(260, 6)
    one, two = cache_of(name), cache_of(name)
    for cache in (one, two):
        run(cache, given, [45, *[1] * (before - 45)])
    run(one, tuple(torch.cat([x[:, :, :before], y[:, :, before:]], 2) for x, y in zip(given, other)), [1, 6])
    one.crop(before + 2)
    one.crop(before)
    sizes = [1, 1, 5, *[1] * 60]
    end = before + sum(sizes)
    found, wanted = (run(cache, tuple(x[:, :, :end] for x in given), sizes) for cache in (one, two))
    assert float((found - wanted).abs().max()) < 1e-4
    assert one.seen == two.seen == end
    assert one.read()[0].shape == two.read()[0].shape


def test_what_a_window_has_left_is_never_missing_in_silence() -> None:
    given = tokens(200, 7)
    cache = cache_of("plain")
    run(cache, given, [120, 1])
    before = {name: tensor.clone() for name, tensor in cache.state.items()}
    with pytest.raises(EffError, match=r"EFF-K203.*window of 40"):
        cache.crop(121 - ROOM - 1)
    with pytest.raises(EffError, match="EFF-K203"):
        cache.crop(122)
    q, k, v = (x[:, :, 121:122] for x in given)
    wide = torch.zeros(1, 1, 1, 200, dtype=torch.bool)
    wide[..., 20:122] = True
    for mask in (wide, torch.where(wide, 0.0, -math.inf), None, band(121, 1, 121)):
        cache.append(k, v)
        with pytest.raises(EffError, match="EFF-K202"):
            cache.attend(q, k, v, mask, False, SCALE)
    for name, tensor in cache.state.items():
        assert torch.equal(tensor, before[name]), name
    cache.crop(121 - ROOM)
    assert cache.seen == 121 - ROOM
    cache.reset()
    wanted, _ = exact(*(x[:, :, :50] for x in given), None, True, SCALE)
    k, v = given[1][:, :, :50], given[2][:, :, :50]
    cache.append(k, v)
    assert float((cache.attend(given[0][:, :, :50], k, v, None, True, SCALE)[0].double() - wanted).abs().max()) < 1e-4
    q, k, v = (x[:, :, 50:52] for x in given)
    cache.append(k, v)  # all are held, and a model that needs no mask passes none
    wanted, _ = exact(q, given[1][:, :, :52], given[2][:, :, :52], None, True, SCALE)
    assert float((cache.attend(q, k, v, None, True, SCALE)[0].double() - wanted).abs().max()) < 1e-4


def test_sequences_take_their_windows_along() -> None:
    given = tokens(180, 8)
    one, two = cache_of("plain"), cache_of("plain")
    run(one, given, [100, 1, 1])
    one.select(torch.tensor([1, 0]))
    turned = tuple(x[[1, 0]] for x in given)
    run(two, turned, [100, 1, 1])
    assert torch.equal(run(one, turned, [1] * 78), run(two, turned, [1] * 78))


def test_a_context_that_gets_too_long_is_refused() -> None:
    cache = cache_of("plain", 130)
    given = tokens(140, 9)
    run(cache, given, [100, *[1] * 28])
    _, k, v = (x[:, :, 128:131] for x in given)
    with pytest.raises(EffError, match="EFF-K201"):
        cache.append(k, v)
    assert cache.seen == 128
