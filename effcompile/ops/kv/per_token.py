"""Store keys and values in 8 bits, integers or floats, with one half-precision scale a token and head.

A token's vector x becomes round(x / scale) in [-127, 127], where scale is the half next to max |x| / 127 that leaves no code
beyond 127.5, so the error is at most scale / 2. Floats (e4m3: 4 bits of exponent, 3 of mantissa, up to 448) have an error of at
most 1/16 of the element, or of scale / 1024 where that is more; their codes are kept as uint8, which every operation takes.

A vector that holds NaN or infinity gets a scale of NaN, and stays what no softmax survives. Keys lie in panels of 64 tokens,
`[panel, channel, token]`, so that neighboring scores fill a register; values lie in rows, padded to 16 channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effcompile.core.cache import CacheShape, State, Storage
from effcompile.ops.kv import common, native

PANEL = 64  # tokens of a panel of keys
ROW = 16  # what a row of values is padded to, in channels
FLOATS = torch.float8_e4m3fn
NAMES = ("k_codes", "v_codes", "k_scales", "v_scales")
FORM = common.Form("token8", (*NAMES, "length"), versions=(3, 1))


def _up(value: int, to: int) -> int:
    return -(-value // to) * to


@dataclass(frozen=True)
class PerToken8(Storage):
    """Keep every token in 8 bits: integers, or `floats`."""

    floats: bool = False

    def capacity(self, tokens: int) -> int:
        """Return whole panels."""
        return _up(max(1, tokens), PANEL)

    def tensors(self, shape: CacheShape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return codes and scales of keys and values."""
        lead, codes = (shape.batch, shape.kv_heads), torch.uint8 if self.floats else torch.int8
        return {
            "k_codes": ((*lead, shape.capacity // PANEL, shape.head_dim, PANEL), codes),
            "v_codes": ((*lead, shape.capacity, _up(shape.value_dim, ROW)), codes),
            "k_scales": ((*lead, shape.capacity), torch.float16),
            "v_scales": ((*lead, shape.capacity), torch.float16),
        }

    def append(self, state: State, k: Tensor, v: Tensor, places: Tensor | None = None) -> None:
        """Add tokens through `eff::kv_append_token8_v3`."""
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
        """Attend through `eff::kv_attention_token8_v1`, or its form that returns the scores."""
        return FORM.attend(state, (q, k, v, mask, causal, scale, softcap), (), (window, format), scored)

    def read(self, state: State, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return tokens [start, stop) as floats; values keep the padding of their rows, which is 0."""
        keys, values = _read(tuple(state[name] for name in NAMES), start, stop)
        return keys.to(dtype), values.to(dtype)


def padded(width: int) -> int:
    """Return how many channels a row of values of `width` channels has."""
    return _up(width, ROW)


def quantize(x: Tensor, floats: bool = False) -> tuple[Tensor, Tensor]:
    """Return (codes of x's shape, scales float16 without the last dimension) of vectors x `[..., D]`."""
    largest, beyond = (448.0, 456.0) if floats else (127.0, 127.5)
    wide = x.float()
    most = wide.abs().amax(-1)
    scale = (most / largest).half()
    scale = torch.where(beyond * scale.float() < most, next_up(scale), scale)
    scale = torch.where(most <= torch.finfo(torch.float32).max, scale, torch.full_like(scale, float("nan")))
    by = scale.float()[..., None]
    usable = (by > 0) & (by <= torch.finfo(torch.float32).max)
    codes = torch.where(usable, wide / by, torch.zeros_like(wide))
    if floats:
        return codes.clamp(-largest, largest).to(FLOATS).view(torch.uint8), scale
    return codes.round().clamp(-largest, largest).to(torch.int8), scale


def next_up(x: Tensor) -> Tensor:
    """Return the next larger half of numbers that are not negative."""
    return (x.view(torch.int16) + 1).view(torch.float16)


def _read(state: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, Tensor]:
    k_codes, v_codes, k_scales, v_scales = state
    first, last = start // PANEL, -(-stop // PANEL)
    panels = k_codes[:, :, first:last].transpose(3, 4).flatten(2, 3)
    keys, values = panels[:, :, start - first * PANEL : stop - first * PANEL], v_codes[:, :, start:stop]
    if k_codes.dtype == torch.uint8:
        keys, values = keys.view(FLOATS), values.view(FLOATS)
    by_key, by_value = (x[:, :, start:stop, None].float() for x in (k_scales, v_scales))
    return keys.float() * by_key, values.float() * by_value


def _bits(codes: Tensor) -> int:
    """Return how the compiled kernels name the codes."""
    return 9 if codes.dtype == torch.uint8 else 8


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
    batch, heads, _, depth, _ = k_codes.shape
    capacity, count = k_scales.shape[2], k.shape[2]
    width = v.shape[3] if _up(v.shape[3], ROW) == v_codes.shape[3] else v_codes.shape[3]
    common.check_shapes((batch, heads, depth, width), k, v)
    if length.device.type == "cpu":
        before = int(length)
        if places is None:
            common.check_room(before, count, capacity)
        else:
            common.check_places(places, k, before, capacity)
        if native.takes(k, v):
            operands = (k_codes, v_codes, k_scales, v_scales, None, None, None, None)
            native.append(_bits(k_codes), k, v, [before, 0, 0, capacity, 0, 0], operands, places)
            return
    if places is not None:
        row, head = common.corners(places)
        for codes, scales, x, panels in ((k_codes, k_scales, k, True), (v_codes, v_scales, v, False)):
            code, scale = (part[:, :, 0] for part in quantize(x, codes.dtype == torch.uint8))
            scales[row, head, places] = scale
            if panels:
                codes[row, head, places // PANEL, :, places % PANEL] = code
            else:
                codes[row, head, places, : x.shape[3]] = code
        return
    next_ones = length + torch.arange(count, device=k.device)
    for codes, scales, x, panels in ((k_codes, k_scales, k, True), (v_codes, v_scales, v, False)):
        code, scale = quantize(x, codes.dtype == torch.uint8)
        scales[:, :, next_ones] = scale
        if panels:
            codes[:, :, next_ones // PANEL, :, next_ones % PANEL] = code.permute(2, 0, 1, 3)
        else:
            codes[:, :, next_ones, : x.shape[3]] = code


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
    capacity, width = k_scales.shape[2], v.shape[3]
    if length.device.type == "cpu":
        tokens = int(length)
        common.check_mask(mask, q, tokens, causal, k.shape[2])
        if native.takes(q, k, v):
            if q.shape[2] > common.FEW and not softcap and not scored:

                def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
                    keys, values = _read(state, start, stop)
                    return keys, values[..., :width]

                return (*common.attend_many(q, read, k, v, tokens, mask, causal, scale), None)
            sizes = [tokens, tokens - k.shape[2], capacity, 0, 0]
            operands = (*state, None, None, None, None)
            return native.attend(_bits(k_codes), q, k, v, mask, sizes, operands, causal, scale, softcap, scored)
    keys, values = _read(state, 0, capacity)
    return common.attention(q, (keys, values[..., :width]), k, v, length, mask, causal, scale, softcap)


def register() -> None:
    """Register the ops, once."""
    FORM.define(append, attend, lambda state: state[2].shape[2])
