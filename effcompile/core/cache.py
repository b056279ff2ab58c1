"""Say how a KV cache is stored: a format is the named answer, a storage is what it means for tensors.

A format is a frozen dataclass in `passes/kv/`, one a file, spelled `kivi{bits=4,group=32,residual=128}`; it looks at a cache site
and gives a storage, or refuses with a reason. A storage (`effcompile/ops/kv/`) knows the tensors that one layer holds, and appends
to them and attends over them through `eff::` ops. It holds no tensor itself: the state is a mapping that the cache owns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effcompile.core.policy import Method
from effcompile.core.site import CacheSite, Refusal

State = Mapping[str, Tensor]
"""The tensors of one layer by name. `length` is int64 `[]`: how many tokens the layer holds."""


@dataclass(frozen=True)
class CacheShape:
    """Describe the tokens of one layer: keys `[batch, kv_heads, capacity, head_dim]` and values with `value_dim`."""

    batch: int
    kv_heads: int
    capacity: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


class Storage(ABC):
    """Keep the tokens of a layer in one form. Subclasses are frozen dataclasses.

    Every tensor of a state but counters and constants begins with the batch, and begins with the same elements when the capacity
    grows.
    """

    @abstractmethod
    def capacity(self, tokens: int) -> int:
        """Return the tokens that the tensors hold when `tokens` are asked for: panels and groups are whole."""

    @abstractmethod
    def tensors(self, shape: CacheShape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of every tensor of the state but the counters, for a capacity that `capacity` gave."""

    @property
    def counters(self) -> tuple[str, ...]:
        """Return the int64 `[]` tensors of the state; `length` is the first."""
        return ("length",)

    @property
    def constants(self) -> tuple[str, ...]:
        """Return the tensors of the state that no token changes; `CacheFormat.constants` gives them."""
        return ()

    @property
    def unit(self) -> int:
        """Return how many neighboring tokens can only be dropped together: one, where every token stands for itself."""
        return 1

    @abstractmethod
    def append(self, state: State, k: Tensor, v: Tensor, places: Tensor | None = None) -> None:
        """Add tokens, k `[B, Hkv, S, D]` and v `[B, Hkv, S, Dv]`, behind those that the state holds.

        Where `unit` is 1, `places`, int64 `[B, Hkv]`, may say where a single token goes: to the next place, or to that of a token
        that is dropped for it.

        Raises:
            EffError: EFF-K201 where the tensors have no place for them, EFF-K202 where they are of another shape; then nothing is
                written.
        """

    def drop(self, state: State, sinks: int, recent: float) -> None:
        """Drop units of tokens until those over `state["budget"]` are fewer than one; needed where `unit` is more than 1."""
        raise NotImplementedError

    @property
    def slack(self) -> int:
        """Return how many tokens the state cannot go below by dropping units."""
        return 0

    @abstractmethod
    def attend(
        self,
        state: State,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        softcap: float,
        window: int,
        format: str,
        scored: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (output `[B, Hq, Q, Dv]`, LSE `[B, Hq, Q]`, scores) of attention over all tokens of the state.

        k and v are the last tokens that were appended; they are read as they are, and only what was there before from the state.
        Column j of `mask`, `[B|1, Hq|1, Q, >= length]` bool (True keeps) or added to the scores, is token j of the state. `causal`
        lets query i see the old tokens and the first i + 1 new ones. A row without keys gives 0. `window` and `format` change
        nothing: they say in a graph what the site is. `scored` asks for the scores as softmax gets them, float32
        `[B, Hq, Q, capacity + S]`: of the places of the state, -inf where there is no token, and of the S new tokens.
        """

    @abstractmethod
    def read(self, state: State, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return tokens [start, stop) of the state as floats, keys `[B, Hkv, N, D]` and values `[B, Hkv, N, Dv]`."""

    def rewind(self, state: State, length: int) -> None:
        """Forget the tokens from `length` on."""
        state["length"].fill_(length)

    def seek(self, state: State, places: Tensor, count: int, limit: int) -> None:
        """Forget the tokens from the first of `places`, int64 `[S]`, on, where `count` tokens are about to be appended.

        Raises:
            EffError: EFF-K203 where the places are no neighbors, or begin behind what is held; EFF-K201 for more than `limit`
                tokens.
        """
        first = torch.ops.eff.kv_seek_v1.default(state["length"], places, count, limit, self.unit > 1)
        state["length"].copy_(first)

    def clear(self, state: State) -> None:
        """Forget all tokens, and what was learned from them."""
        for name in self.counters:
            state[name].zero_()


@dataclass(frozen=True)
class Tiers:
    """Say how tokens are divided among two numbers of bits, the first for those that are read most.

    The last `residual` tokens and up to `interval` more are not packed. The first tier gets the share of the fewest tokens that
    hold `mass` of what the `recent` last and `spread` other queries of a prompt read, and at least `least`.
    """

    bits: tuple[int, int]
    group: int
    residual: int
    interval: int
    mass: float
    recent: int
    spread: int
    least: float


class CacheFormat(Method):
    """Answer how a KV cache is stored. Subclasses are frozen dataclasses, one a file; every field has a default."""

    family: ClassVar[str] = "kv"

    @property
    def tiers(self) -> Tiers | None:
        """Return how tokens are divided where not all are stored alike; then `storage` is that of the first tier."""
        return None

    @abstractmethod
    def storage(self, site: CacheSite) -> Storage | Refusal:
        """Return how the tokens of a site are stored, or why they cannot be."""

    def latents(self, site: CacheSite) -> Storage | Refusal:
        """Return how the latents of a site of layout "mla" are stored, or why they cannot be."""
        return Refusal(
            "EFF-K204",
            "the site holds latents (MLA), which it stores by token only",
            "int8-per-token or fp8, which store latents as well",
        )

    def constants(self, site: CacheSite) -> dict[str, Tensor]:
        """Return the tensors of `Storage.constants` for a site.

        Raises:
            EffError: EFF-K207 where they need a calibration that is missing or of another model.
        """
        return {}
