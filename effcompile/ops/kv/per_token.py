"""Store keys and values as 8-bit integers with one half-precision scale a token and head.

A token's vector x becomes round(x / scale) in [-127, 127], where scale is the half next to max |x| / 127 that leaves no code
beyond 127.5, so the error is at most scale / 2. A vector that holds NaN or infinity gets a scale of NaN, and stays what no softmax
survives. Keys lie in panels of 64 tokens, `[panel, channel, token]`, so that neighboring scores fill a register; values lie in
rows, padded to 16 channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effcompile.core.cache import CacheShape, State, Storage
from effcompile.ops import flash
from effcompile.ops.attention import define
from effcompile.ops.kv import common, native

APPEND, ATTENTION = "eff::kv_append_int8_v1", "eff::kv_attention_int8_v1"
PANEL = 64  # tokens of a panel of keys
ROW = 16  # what a row of values is padded to, in channels
NAMES = ("k_codes", "v_codes", "k_scales", "v_scales")


def _up(value: int, to: int) -> int:
    return -(-value // to) * to


@dataclass(frozen=True)
class PerToken8(Storage):
    """Keep every token in 8 bits."""

    def capacity(self, tokens: int) -> int:
        """Return whole panels."""
        return _up(max(1, tokens), PANEL)

    def tensors(self, shape: CacheShape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return codes and scales of keys and values."""
        lead = (shape.batch, shape.kv_heads)
        return {
            "k_codes": ((*lead, shape.capacity // PANEL, shape.head_dim, PANEL), torch.int8),
            "v_codes": ((*lead, shape.capacity, _up(shape.value_dim, ROW)), torch.int8),
            "k_scales": ((*lead, shape.capacity), torch.float16),
            "v_scales": ((*lead, shape.capacity), torch.float16),
        }

    def append(self, state: State, k: Tensor, v: Tensor) -> None:
        """Add tokens through `eff::kv_append_int8_v1`."""
        torch.ops.eff.kv_append_int8_v1.default(*(state[name] for name in NAMES), state["length"], k, v)

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
    ) -> tuple[Tensor, Tensor]:
        """Attend through `eff::kv_attention_int8_v1`."""
        tensors = (*(state[name] for name in NAMES), state["length"])
        found: tuple[Tensor, Tensor] = torch.ops.eff.kv_attention_int8_v1.default(
            q, k, v, *tensors, mask, causal, scale, softcap, window, format
        )
        return found

    def read(self, state: State, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return tokens [start, stop) as floats; values keep the padding of their rows, which is 0."""
        keys, values = _read(tuple(state[name] for name in NAMES), start, stop)
        return keys.to(dtype), values.to(dtype)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes int8 of x's shape, scales float16 without the last dimension) of vectors x `[..., D]`."""
    wide = x.float()
    most = wide.abs().amax(-1)
    scale = (most / 127.0).half()
    scale = torch.where(127.5 * scale.float() < most, next_up(scale), scale)
    scale = torch.where(most <= torch.finfo(torch.float32).max, scale, torch.full_like(scale, float("nan")))
    by = scale.float()[..., None]
    codes = (wide / by).round().clamp(-127, 127)
    usable = (by > 0) & (by <= torch.finfo(torch.float32).max)
    return torch.where(usable, codes, torch.zeros_like(codes)).to(torch.int8), scale


def next_up(x: Tensor) -> Tensor:
    """Return the next larger half of numbers that are not negative."""
    return (x.view(torch.int16) + 1).view(torch.float16)


def _read(state: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, Tensor]:
    k_codes, v_codes, k_scales, v_scales = state
    first, last = start // PANEL, -(-stop // PANEL)
    panels = k_codes[:, :, first:last].transpose(3, 4).flatten(2, 3)
    keys = panels[:, :, start - first * PANEL : stop - first * PANEL].float() * k_scales[:, :, start:stop, None].float()
    return keys, v_codes[:, :, start:stop].float() * v_scales[:, :, start:stop, None].float()


def append(
    k_codes: Tensor, v_codes: Tensor, k_scales: Tensor, v_scales: Tensor, length: Tensor, k: Tensor, v: Tensor
) -> None:
    """Write tokens k `[B, Hkv, S, D]`, v `[B, Hkv, S, Dv]` behind the `length` that are there, and count them.

    Raises:
        EffError: EFF-K201 without place (on CPU; elsewhere the device checks the index), EFF-K202 for another shape.
    """
    batch, heads, _, depth, _ = k_codes.shape
    capacity, count = k_scales.shape[2], k.shape[2]
    width = v.shape[3] if _up(v.shape[3], ROW) == v_codes.shape[3] else v_codes.shape[3]
    common.check_shapes((batch, heads, depth, width), k, v)
    if length.device.type == "cpu":
        before = int(length)
        common.check_room(before, count, capacity)
        if native.takes(k, v):
            native.append(
                8, k, v, [before, 0, 0, capacity, 0, 0], (k_codes, v_codes, k_scales, v_scales, None, None, None, None)
            )
            length.add_(count)
            return
    places = length + torch.arange(count, device=k.device)
    for codes, scales, x, panels in ((k_codes, k_scales, k, True), (v_codes, v_scales, v, False)):
        code, scale = quantize(x)
        scales[:, :, places] = scale
        if panels:
            codes[:, :, places // PANEL, :, places % PANEL] = code.permute(2, 0, 1, 3)
        else:
            codes[:, :, places, : x.shape[3]] = code
    length.add_(count)


def attention(
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
    window: int,
    format: str,
) -> tuple[Tensor, Tensor]:
    """Compute attention as `Storage.attend` says."""
    state = (k_codes, v_codes, k_scales, v_scales)
    capacity, width = k_scales.shape[2], v.shape[3]
    if length.device.type == "cpu":
        tokens = int(length)
        common.check_mask(mask, q, tokens, causal, k.shape[2])
        if native.takes(q, k, v):
            if q.shape[2] > common.FEW and not softcap:

                def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
                    keys, values = _read(state, start, stop)
                    return keys, values[..., :width]

                return common.attend_many(q, read, k, v, tokens, mask, causal, scale)
            sizes = [tokens, tokens - k.shape[2], capacity, 0, 0]
            operands = (*state, None, None, None, None)
            return native.attend(8, q, k, v, mask, sizes, operands, causal, scale, softcap)
    keys, values = _read(state, 0, capacity)
    return common.attention(q, (keys, values[..., :width]), k, v, length, mask, causal, scale, softcap)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return flash.fake_pair(q, k, v)


def _writes(*tensors: object) -> None:
    return None


def register() -> None:
    """Register the ops, once."""
    state = "Tensor{} k_codes, Tensor{} v_codes, Tensor{} k_scales, Tensor{} v_scales, Tensor{} length"
    written = state.format("(a!)", "(b!)", "(c!)", "(d!)", "(e!)")
    define(APPEND, f"({written}, Tensor k, Tensor v) -> ()", append, _writes)
    define(
        ATTENTION,
        f"(Tensor q, Tensor k, Tensor v, {state.format('', '', '', '', '')}, Tensor? mask, bool causal, float scale, "
        "float softcap, int window, str format) -> (Tensor, Tensor)",
        attention,
        _fake,
    )
