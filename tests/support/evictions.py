"""Make caches that drop tokens, and feed them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effcompile.core.cache import CacheFormat
from effcompile.core.eviction import CacheEviction
from effcompile.core.site import CacheSite
from effcompile.passes.kv.expected_attention import ExpectedAttention
from effcompile.passes.kv.int8_per_token import Int8PerToken
from effcompile.passes.kv.keyformer import Keyformer
from effcompile.passes.kv.kivi import Kivi
from effcompile.passes.kv.plain import Plain
from effcompile.passes.kv.sink_window import SinkWindow
from effcompile.passes.kv.snapkv import SnapKV
from effcompile.runtime.eviction import EvictingCache
from tests.support.caches import draw

SCALE = 0.15
FORMATS: dict[str, CacheFormat] = {"plain": Plain(), "int8": Int8PerToken(), "kivi": Kivi(residual=32)}
POLICIES: dict[str, CacheEviction] = {
    "sink-window": SinkWindow(window=40, sinks=3),
    "snapkv": SnapKV(budget=50, window=8),
    "expected-attention": ExpectedAttention(keep=0.4, least=20),
    "keyformer": Keyformer(keep=0.4, least=20),
}


def cache_of(policy: CacheEviction, name: str = "plain", capacity: int = 0, **more: Any) -> EvictingCache:
    site = CacheSite("layers.3.cache", "cache", "decode", "", kv_heads=2, capacity=capacity, dtype="float32")
    return EvictingCache(FORMATS[name], site, policy, **more)


def tokens(count: int, seed: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Return q of 4 heads, and k and v of 2."""
    q, k, v = (
        draw(batch, heads, count, 64, dtype=torch.float32, seed=3 * seed + n) for n, heads in enumerate((4, 2, 2))
    )
    return q, k, v


def feed(cache: EvictingCache, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    cache.append(k, v)
    return cache.attend(q, k, v, mask, mask is None and q.shape[2] > 1, SCALE)


def parts(given: tuple[Tensor, Tensor, Tensor], sizes: list[int]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.split(sizes, 2) for x in given)))


def kept(cache: EvictingCache) -> Tensor:
    """Return which tokens of the context are held, sorted, int64 `[B, Hkv, N]`."""
    return cache.state["positions"][:, :, : cache.length].long().sort(-1).values


def padded_mask(pad: list[int], start: int, count: int, total: int) -> Tensor:
    """Return the causal mask `[B, 1, count, total]` of queries from token `start` on, in sequences with padding on the left."""
    column, row = torch.arange(total), torch.arange(start, start + count)[:, None]
    return torch.stack([(column <= row) & (column >= n) for n in pad])[:, None]
