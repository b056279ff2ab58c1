"""Store keys and values in rows of 8 or 4 bits, with scales of channels that no token changes.

The layout is that of ONNX Runtime's GroupQueryAttention with a quantized cache: codes `[B, Hkv, C, D]` int8, round(x / scale) in
[-128, 127], or `[B, Hkv, C, D / 2]` uint8 with the codes of two channels in [-8, 7], plus 8, of which the even one is in the low
half. Scales are float32 `[Hkv, D]`. They were measured before: an element that they do not reach is clipped, within it the error
is at most scale / 2. NaN becomes 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effcompile.core.cache import CacheShape, State, Storage
from effcompile.ops.kv import common, native

NAMES = ("k_codes", "v_codes", "k_scales", "v_scales")
FORM = common.Form("rows", (*NAMES, "length"))
ROW = 16  # channels that a row has multiples of


@dataclass(frozen=True)
class Fixed(Storage):
    """Keep every token in `bits` 8 or 4."""

    bits: int = 8

    def capacity(self, tokens: int) -> int:
        """Return the tokens that are asked for."""
        return max(1, tokens)

    @property
    def constants(self) -> tuple[str, ...]:
        """Return the scales."""
        return ("k_scales", "v_scales")

    @property
    def levels(self) -> int:
        """Return the largest code."""
        return int(2 ** (self.bits - 1) - 1)

    def tensors(self, shape: CacheShape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return codes, and the scales of all channels."""
        lead, part = (shape.batch, shape.kv_heads, shape.capacity), 8 // self.bits
        codes = torch.int8 if self.bits == 8 else torch.uint8
        return {
            "k_codes": ((*lead, shape.head_dim // part), codes),
            "v_codes": ((*lead, shape.value_dim // part), codes),
            "k_scales": ((shape.kv_heads, shape.head_dim), torch.float32),
            "v_scales": ((shape.kv_heads, shape.value_dim), torch.float32),
        }

    def append(self, state: State, k: Tensor, v: Tensor, places: Tensor | None = None) -> None:
        """Add tokens through `eff::kv_append_rows_v1`."""
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
        """Attend through `eff::kv_attention_rows_v1`, or its form that returns the scores."""
        return FORM.attend(state, (q, k, v, mask, causal, scale, softcap), (), (window, format), scored)

    def read(self, state: State, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return tokens [start, stop) as floats."""
        keys, values = _read(tuple(state[name] for name in NAMES), start, stop)
        return keys.to(dtype), values.to(dtype)


def quantize(x: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return the codes `[B, Hkv, S, D]` or `[B, Hkv, S, D / 2]` of x `[B, Hkv, S, D]`, with scales `[Hkv, D]`."""
    most = 2 ** (bits - 1)
    codes = (x.float() / scales[:, None]).round().clamp(-most, most - 1).nan_to_num(nan=0.0)
    if bits == 8:
        return codes.to(torch.int8)
    pair = (codes + 8).to(torch.uint8).unflatten(3, (-1, 2))
    return pair[..., 0] | pair[..., 1] << 4


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Return float32 `[B, Hkv, S, D]` of codes."""
    if codes.dtype == torch.uint8:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(3).float() - 8
    return codes.float() * scales[:, None]


def _read(state: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, Tensor]:
    k_codes, v_codes, k_scales, v_scales = state
    return dequantize(k_codes[:, :, start:stop], k_scales), dequantize(v_codes[:, :, start:stop], v_scales)


def _bits(codes: Tensor) -> int:
    """Return how the compiled kernels name the codes."""
    return 16 if codes.dtype == torch.int8 else 17


def append(
    k_codes: Tensor,
    v_codes: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    length: Tensor,
    k: Tensor,
    v: Tensor,
    places: Tensor | None = None,
) -> None:
    """Write tokens k `[B, Hkv, S, D]`, v `[B, Hkv, S, Dv]` behind the `length` that are there.

    With `places`, int64 `[B, Hkv]`, the one token that there is goes to those.

    Raises:
        EffError: EFF-K201 without place (on CPU; elsewhere the device checks the index), EFF-K202 for another shape.
    """
    batch, heads, capacity, _ = k_codes.shape
    common.check_shapes((batch, heads, k_scales.shape[1], v_scales.shape[1]), k, v)
    if length.device.type == "cpu":
        before = int(length)
        if places is None:
            common.check_room(before, k.shape[2], capacity)
        else:
            common.check_places(places, k, before, capacity)
        if native.takes(k, v):
            operands = (k_codes, v_codes, k_scales, v_scales, None, None, None, None)
            native.append(_bits(k_codes), k, v, [before, 0, 0, capacity, 0, 0], operands, places)
            return
    for held, scales, x in ((k_codes, k_scales, k), (v_codes, v_scales, v)):
        codes = quantize(x, scales, 8 if held.dtype == torch.int8 else 4)
        if places is None:
            held.index_copy_(2, length + torch.arange(k.shape[2], device=k.device), codes)
        else:
            held[(*common.corners(places), places)] = codes[:, :, 0]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_codes: Tensor,
    v_codes: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    length: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    *,
    scored: bool,
) -> common.Attended:
    """Compute attention as `Storage.attend` says."""
    state = (k_codes, v_codes, k_scales, v_scales)
    capacity = k_codes.shape[2]
    if length.device.type == "cpu":
        tokens = int(length)
        common.check_mask(mask, q, tokens, causal, k.shape[2])
        if native.takes(q, k, v):
            if q.shape[2] > common.FEW and not softcap and not scored:
                found = common.attend_many(
                    q, lambda start, stop: _read(state, start, stop), k, v, tokens, mask, causal, scale
                )
                return (*found, None)
            sizes = [tokens, tokens - k.shape[2], capacity, 0, 0]
            operands = (*state, None, None, None, None)
            return native.attend(_bits(k_codes), q, k, v, mask, sizes, operands, causal, scale, softcap, scored)
    return common.attention(q, _read(state, 0, capacity), k, v, length, mask, causal, scale, softcap)


def register() -> None:
    """Register the ops, once."""
    FORM.define(append, attend, lambda state: state[0].shape[2])
