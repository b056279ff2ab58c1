"""Say which tokens of a KV cache stay: a policy of family `evict` ranks them, and the cache drops the last of the ranking.

A policy is a frozen dataclass in `passes/kv/`, one a file, spelled `snapkv{budget=1024,window=32}`. It sees a `Context` when a
prompt has been read; where it drops a token for each that arrives (`steps`) it says what it sums for a token, and the cache
drops the least.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effcompile.core.policy import Method

PROMPT = 33
"""Tokens of a call from which on it is a prompt, where a policy says nothing else: fewer are steps, or proposals to be verified."""
ALL = 1 << 62
"""A budget that drops nothing."""


@dataclass(frozen=True)
class Rotation:
    """Turn queries and keys by their places as the model does.

    `angles(places)` gives cosines and sines `[S, R]` of int64 places `[S]`, `turn(x, cosines, sines)` the turned x `[B, H, S,
    D]`. Turning is linear in both, so a mean of them is the mean of the turns.
    """

    angles: Callable[[Tensor], tuple[Tensor, Tensor]]
    turn: Callable[[Tensor, Tensor, Tensor], Tensor]

    def back(self, x: Tensor, places: Tensor) -> Tensor:
        """Return x `[B, H, S, D]` as it was before it was turned by `places` `[S]`."""
        cosines, sines = self.angles(places)
        size = cosines.square() + sines.square()  # not 1 where the model scales its angles
        return self.turn(x, cosines / size, -sines / size)


@dataclass(frozen=True)
class Context:
    """Describe what one layer holds at the end of a call of S tokens: held ones first, those of the call last, N in all.

    q `[B, Hq, S, D]`; k `[B, Hkv, N, D]`; v `[B, Hkv, N, Dv]`, both in the model's dtype; positions int64 `[B, Hkv, N]`: which
    token of the context each is; real bool `[B, Hkv, N]`: no padding; start int64 `[B]`: the first token that is none; mask
    `[B|1, Hq|1, S, N]` as attention had it; mass float32 `[B, Hkv, N]`, with what this call added, where the policy sums
    something; total: tokens that there have been, with those of the call; budget: how many of them stay; layer: its number.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    real: Tensor
    start: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    softcap: float
    mass: Tensor
    total: int
    budget: int
    layer: int
    rotation: Rotation | None = None

    @property
    def fresh(self) -> int:
        """Return how many tokens the call has."""
        return self.q.shape[2]


@dataclass(frozen=True)
class Step:
    """Describe the queries of a call for a policy that sums: scores `[B, Hq, Q, N]` as softmax gets them.

    positions int64 `[B, Hkv, N]`; rows int64 `[Q]`: which tokens of the context the queries are; start int64 `[B]`; after
    int64 `[]`: how many tokens came since the prompt, 0 in the prompt.
    """

    scores: Tensor
    positions: Tensor
    rows: Tensor
    start: Tensor
    after: Tensor
    layer: int


class CacheEviction(Method):
    """Answer which tokens of a KV cache stay. Subclasses are frozen dataclasses, one a file; every field has a default.

    `steps` says that it drops a token for each that arrives once the budget is held, `sums` that it sums something for each token,
    `turns` that it needs the model's `Rotation`.
    """

    family: ClassVar[str] = "evict"
    steps: ClassVar[bool] = False
    sums: ClassVar[bool] = False
    turns: ClassVar[bool] = False

    @abstractmethod
    def stays(self, total: int) -> int:
        """Return how many tokens stay of a context of `total` tokens, `ALL` for every one."""

    @abstractmethod
    def rank(self, context: Context) -> Tensor:
        """Return a number for each token `[B, Hkv, N]`: those with the largest stay, with infinity always."""

    def waits(self) -> int:
        """Return of how many tokens a call must be for the policy to choose anew. What a shorter one brings stays."""
        return 1 if self.steps else PROMPT

    def first(self) -> int:
        """Return how many tokens at the begin of a context always stay."""
        return 0

    def last(self) -> float:
        """Return which share of the budget always stays at the end of a context while single tokens arrive."""
        return 0.0

    def judges(self, count: int) -> int:
        """Return how many of `count` queries of a prompt are asked what they read; they stand for the others."""
        return count

    def gain(self, step: Step) -> Tensor:
        """Return what queries add to the sums of tokens, float32 `[B, Hkv, N]`."""
        raise NotImplementedError


def stay(rank: Tensor, real: Tensor, count: int) -> Tensor:
    """Return the places `[B, Hkv, count]` of the largest ranks, in the order of the context; of equal ones the first."""
    rank = torch.where(real, rank.double(), -torch.inf)
    return rank.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values
