"""Make states of KV caches, and attention in float64 to compare them with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effcompile.core.cache import CacheShape, Storage
from effcompile.ops.kv.fixed import Fixed
from effcompile.ops.kv.grouped import Grouped
from effcompile.ops.kv.per_token import PerToken8
from effcompile.ops.kv.plain import Plain
from effcompile.ops.kv.two_plane import TwoPlane

STORAGES: dict[str, Storage] = {
    "plain": Plain(),
    "int8": PerToken8(),
    "fp8": PerToken8(floats=True),
    "4-32-128": Grouped(4, 32, 128),
    "4-64-64": Grouped(4, 64, 64),
    "2-32-32": Grouped(2, 32, 32),
    "2-64-128": Grouped(2, 64, 128),
    "rows-8": Fixed(8),
    "rows-4": Fixed(4),
    "planes": TwoPlane(2.0),
}
"""What all tests of caches run over; `planes` reads both planes always, so that it is one function of what it holds."""


GROUPED = tuple(name for name, storage in STORAGES.items() if isinstance(storage, Grouped))
REACH = 30.0
"""The largest magnitude that the scales of `rows` reach: no element that `draw` makes is larger."""


def dims_of(name: str) -> tuple[int, int]:
    """Return dimensions of keys and values that a storage takes, odd ones where it can."""
    return (64, 128) if isinstance(STORAGES[name], Grouped | Fixed) else (72, 40)


def empty(storage: Storage, shape: CacheShape) -> dict[str, Tensor]:
    """Return the state of a cache without tokens."""
    state = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in storage.tensors(shape).items()}
    for name in storage.constants:
        state[name].fill_(REACH / storage.levels)  # type: ignore[attr-defined]
        state[name] *= 1 + torch.arange(state[name].shape[1]) / 64  # no two channels alike
    return state | {name: torch.zeros((), dtype=torch.int64) for name in storage.counters}


def shape_of(
    storage: Storage, tokens: int, batch: int, heads: int, dims: tuple[int, int], dtype: torch.dtype
) -> CacheShape:
    """Return the shape of a cache for `tokens`."""
    return CacheShape(batch, heads, storage.capacity(tokens), *dims, dtype, torch.device("cpu"))


def draw(*sizes: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return normal numbers `[B, H, S, D]` as a model has them: a view of `[B, S, H, D]`, one channel larger than the others."""
    batch, heads, count, depth = sizes
    made = torch.randn(batch, count, heads, depth, generator=torch.Generator().manual_seed(seed))
    made[..., depth // 3] = made[..., depth // 3] * 5 + 3
    return made.to(dtype).transpose(1, 2)


def exact_scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float = 0.0) -> Tensor:
    """Return the scores of q over all keys in float64, -inf where a query does not see the key."""
    q, k = q.double(), k.repeat_interleave(q.shape[1] // k.shape[1], 1).double()
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    rows, columns = scores.shape[-2:]
    if mask is not None:
        seen = mask[..., :columns]
        scores = scores.masked_fill(~seen, -math.inf) if seen.dtype == torch.bool else scores + seen
    if causal:
        scores = scores.masked_fill(~torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows), -math.inf)
    return scores


def exact(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return (output, LSE) in float64 of q over all keys; the queries are the last of the tokens where `causal` is set."""
    scores = exact_scores(q, k, mask, causal, scale, softcap)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1).double()
    lse = scores.logsumexp(-1)
    probs = torch.where(lse[..., None] == -math.inf, 0.0, (scores - lse[..., None]).exp())
    return probs @ v, lse
