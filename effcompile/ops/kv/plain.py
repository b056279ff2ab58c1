"""Store keys and values as the model makes them, so that policies which only drop tokens have a cache to drop them from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effcompile.core.cache import CacheShape, State, Storage
from effcompile.ops.kv import common, native

NAMES = ("keys", "values")
FORM = common.Form("plain", (*NAMES, "length"), versions=(2, 1))


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
        """Add tokens through `eff::kv_append_plain_v2`."""
        FORM.append(state, k, v, places, places=places)

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
        return FORM.attend(state, (q, k, v, mask, causal, scale, softcap), (), (window, format), scored)

    def read(self, state: State, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return tokens [start, stop)."""
        keys, values = (state[name][:, :, start:stop].to(dtype, copy=True) for name in NAMES)
        return keys, values


def append(keys: Tensor, values: Tensor, length: Tensor, k: Tensor, v: Tensor, places: Tensor | None = None) -> None:
    """Write tokens k `[B, Hkv, S, D]`, v `[B, Hkv, S, Dv]` behind the `length` that are there.

    With `places`, int64 `[B, Hkv]`, the one token that there is goes to those.

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


def register() -> None:
    """Register the ops, once."""
    FORM.define(append, attend, lambda state: state[0].shape[2])
