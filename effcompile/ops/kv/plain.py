"""Store keys and values as the model makes them, so that policies which only drop tokens have a cache to drop them from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effcompile.core.cache import CacheShape, State, Storage
from effcompile.ops import flash
from effcompile.ops.attention import define
from effcompile.ops.kv import common, native

APPEND, ATTENTION = "eff::kv_append_plain_v1", "eff::kv_attention_plain_v1"
SCORED = "eff::kv_attention_scored_plain_v1"
NAMES = ("keys", "values")


@dataclass(frozen=True)
class Plain(Storage):
    """Keep every token as it is."""

    def capacity(self, tokens: int) -> int:
        """Return the tokens that are asked for."""
        return max(1, tokens)

    def tensors(self, shape: CacheShape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return keys and values."""
        lead = (shape.batch, shape.kv_heads, shape.capacity)
        return {"keys": ((*lead, shape.head_dim), shape.dtype), "values": ((*lead, shape.value_dim), shape.dtype)}

    def append(self, state: State, k: Tensor, v: Tensor, places: Tensor | None = None) -> None:
        """Add tokens through `eff::kv_append_plain_v1`."""
        torch.ops.eff.kv_append_plain_v1.default(state["keys"], state["values"], state["length"], k, v, places)

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
    ) -> common.Attended:
        """Attend through `eff::kv_attention_plain_v1`, or its form that returns the scores."""
        tensors = (state["keys"], state["values"], state["length"])
        given = (q, k, v, *tensors, mask, causal, scale, softcap, window, format)
        if scored:
            return torch.ops.eff.kv_attention_scored_plain_v1.default(*given)  # type: ignore[no-any-return]
        return (*torch.ops.eff.kv_attention_plain_v1.default(*given), None)

    def read(self, state: State, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return tokens [start, stop)."""
        keys, values = (state[name][:, :, start:stop].to(dtype, copy=True) for name in NAMES)
        return keys, values


def append(keys: Tensor, values: Tensor, length: Tensor, k: Tensor, v: Tensor, places: Tensor | None = None) -> None:
    """Write tokens k `[B, Hkv, S, D]`, v `[B, Hkv, S, Dv]` behind the `length` that are there, and count them.

    With `places`, int64 `[B, Hkv]`, the one token that there is goes to those, and counts where they are the next ones.

    Raises:
        EffError: EFF-K201 without place (on CPU; elsewhere the device checks the index), EFF-K202 for another shape or dtype.
    """
    batch, heads, capacity, depth = keys.shape
    common.check_shapes((batch, heads, depth, values.shape[3]), k, v, keys.dtype)
    if length.device.type == "cpu":
        if places is None:
            common.check_room(int(length), k.shape[2], capacity)
        else:
            common.check_places(places, k, int(length), capacity)
    for held, x in ((keys, k), (values, v)):
        if places is None:
            held.index_copy_(2, length + torch.arange(k.shape[2], device=k.device), x)
        else:
            held[(*common.corners(places), places)] = x[:, :, 0]
    common.count(length, k.shape[2], places)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    *,
    scored: bool,
) -> common.Attended:
    """Compute attention as `Storage.attend` says."""
    capacity = keys.shape[2]
    if length.device.type == "cpu":
        tokens = int(length)
        common.check_mask(mask, q, tokens, causal, k.shape[2])
        if native.takes(q, k, v, keys):
            if q.shape[2] > common.FEW and not softcap and not scored:

                def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
                    return keys[:, :, start:stop].float(), values[:, :, start:stop].float()

                return (*common.attend_many(q, read, k, v, tokens, mask, causal, scale), None)
            # To the kernel all tokens are recent ones.
            operands = (None, None, None, None, None, None, keys, values)
            return native.attend(
                0, q, k, v, mask, [tokens, 0, capacity, 1, capacity], operands, causal, scale, softcap, scored
            )
    return common.attention(q, (keys, values), k, v, length, mask, causal, scale, softcap)


def attention(*given: Any) -> tuple[Tensor, Tensor]:
    """Compute attention as `Storage.attend` says; the last operands are what the site is."""
    out, lse, _ = attend(*given[:-2], scored=False)
    return out, lse


def scored(*given: Any) -> common.Attended:
    """Compute the same, and return the scores."""
    return attend(*given[:-2], scored=True)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return flash.fake_pair(q, k, v)


def _fake_scored(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (*flash.fake_pair(q, k, v), common.fake_scores(q, k, rest[0].shape[2]))


def _writes(*tensors: object) -> None:
    return None


def register() -> None:
    """Register the ops, once."""
    written = "Tensor(a!) keys, Tensor(b!) values, Tensor(c!) length"
    define(APPEND, f"({written}, Tensor k, Tensor v, Tensor? places) -> ()", append, _writes)
    schema = (
        "(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor length, Tensor? mask, bool causal, float scale, "
        "float softcap, int window, str format)"
    )
    define(ATTENTION, f"{schema} -> (Tensor, Tensor)", attention, _fake)
    define(SCORED, f"{schema} -> (Tensor, Tensor, Tensor)", scored, _fake_scored)
