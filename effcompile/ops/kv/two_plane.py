"""Store keys in 12 bits, as two planes of which the lower one is read where it matters (SpAtten, arXiv:2012.09852).

A key becomes round(x / scale) in [-2047, 2047], where scale is the half next to max |x| / 2047, one a token and head. The upper
plane holds code >> 4, an int8, in panels as `per_token.py` has them; the lower one code & 15, `[panel, channel / 2, token]` bytes
with an even channel in the low half. Values are 8 bits a channel with a scale a token.

Attention reads the upper plane and takes the lower one for its middle, 8. Where that gives some query of a key head no probability
of `theta` or more, the lower plane is read and the head is computed again: a flat row is what errors of scores change most. `peak`
float32 `[B, Hkv]`, where the state has it, is the largest probability at the last step, by which the next one decides without
having computed anything. Calls of many queries read both planes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from effcompile.core.cache import CacheShape, State, Storage
from effcompile.ops.kv import common, native, per_token
from effcompile.ops.kv.per_token import PANEL

NAMES = ("k_codes", "v_codes", "k_scales", "v_scales", "k_low")
FORM = common.Form("planes", (*NAMES, "length"), ("Tensor? peak", "float theta"), peaks=True)
_MOST = 2047.0
_NAME = 12  # how the compiled kernels name the codes


@dataclass(frozen=True)
class TwoPlane(Storage):
    """Keep keys in two planes; `stale` decides by the step before."""

    theta: float
    stale: bool = False

    def capacity(self, tokens: int) -> int:
        """Return whole panels."""
        return -(-max(1, tokens) // PANEL) * PANEL

    def tensors(self, shape: CacheShape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return both planes of keys, values, their scales and, where it is needed, the last peak."""
        lead, panels = (shape.batch, shape.kv_heads), shape.capacity // PANEL
        found = per_token.PerToken8().tensors(shape)
        found["k_low"] = ((*lead, panels, shape.head_dim // 2, PANEL), torch.uint8)
        return found | ({"peak": (lead, torch.float32)} if self.stale else {})

    def append(self, state: State, k: Tensor, v: Tensor, places: Tensor | None = None) -> None:
        """Add tokens through `eff::kv_append_planes_v1`."""
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
        """Attend through `eff::kv_attention_planes_v1`, or its form that returns the scores."""
        asked, peak = (q, k, v, mask, causal, scale, softcap), state.get("peak")
        out, lse, scores, now = FORM.run(state, asked, (peak, self.theta), (window, format), scored)
        if peak is not None:
            peak.copy_(now)
        return out, lse, scores

    def read(self, state: State, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return tokens [start, stop) as floats, from both planes; values keep the padding of their rows, which is 0."""
        keys, values = _read(tuple(state[name] for name in NAMES), start, stop)
        return keys.to(dtype), values.to(dtype)

    def rewind(self, state: State, length: int) -> None:
        """Forget the tokens from `length` on; the next step reads both planes."""
        super().rewind(state, length)
        if self.stale:
            state["peak"].zero_()

    def clear(self, state: State) -> None:
        """Forget all tokens, and the peaks."""
        super().clear(state)
        self.rewind(state, 0)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes int16 of x's shape, scales float16 without the last dimension) of keys x `[..., D]`."""
    wide = x.float()
    most = wide.abs().amax(-1)
    scale = (most / _MOST).half()
    scale = torch.where((_MOST + 0.5) * scale.float() < most, per_token.next_up(scale), scale)
    scale = torch.where(most <= torch.finfo(torch.float32).max, scale, torch.full_like(scale, math.nan))
    by = scale.float()[..., None]
    usable = (by > 0) & (by <= torch.finfo(torch.float32).max)
    codes = torch.where(usable, wide / by, torch.zeros_like(wide))
    return codes.round().clamp(-_MOST, _MOST).to(torch.int16), scale


def split(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return both planes of codes `[..., D]`: int8 `[..., D]` and uint8 `[..., D / 2]`."""
    low = (codes & 15).to(torch.uint8).unflatten(-1, (-1, 2))
    return (codes >> 4).to(torch.int8), low[..., 0] | low[..., 1] << 4


def join(high: Tensor, low: Tensor | None) -> Tensor:
    """Return float32 codes of an upper plane `[..., D]` and a lower one, or its middle."""
    if low is None:
        return high.float() * 16 + 8
    return high.float() * 16 + torch.stack([low & 15, low >> 4], -1).flatten(-2).float()


def _tokens(panels: Tensor, start: int, stop: int) -> Tensor:
    """Return tokens [start, stop) of panels `[B, Hkv, P, channels, 64]` as rows."""
    first, last = start // PANEL, -(-stop // PANEL)
    rows = panels[:, :, first:last].transpose(3, 4).flatten(2, 3)
    return rows[:, :, start - first * PANEL : stop - first * PANEL]


def _read(state: tuple[Tensor, ...], start: int, stop: int, whole: bool = True) -> tuple[Tensor, Tensor]:
    k_codes, v_codes, k_scales, v_scales, k_low = state
    codes = join(_tokens(k_codes, start, stop), _tokens(k_low, start, stop) if whole else None)
    keys, values = codes, v_codes[:, :, start:stop].float()
    return keys * k_scales[:, :, start:stop, None].float(), values * v_scales[:, :, start:stop, None].float()


def append(
    k_codes: Tensor,
    v_codes: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    k_low: Tensor,
    length: Tensor,
    k: Tensor,
    v: Tensor,
    places: Tensor | None = None,
) -> None:
    """Write tokens k `[B, Hkv, S, D]`, v `[B, Hkv, S, Dv]` behind the `length` that are there, or one each to `places`.

    Raises:
        EffError: EFF-K201 without place (on CPU; elsewhere the device checks the index), EFF-K202 for another shape.
    """
    batch, heads, _, depth, _ = k_codes.shape
    capacity, count = k_scales.shape[2], k.shape[2]
    width = v.shape[3] if per_token.padded(v.shape[3]) == v_codes.shape[3] else v_codes.shape[3]
    common.check_shapes((batch, heads, depth, width), k, v)
    if length.device.type == "cpu":
        before = int(length)
        if places is None:
            common.check_room(before, count, capacity)
        else:
            common.check_places(places, k, before, capacity)
        if native.takes(k, v):
            operands = (k_codes, v_codes, k_scales, v_scales, k_low, None, None, None)
            native.append(_NAME, k, v, [before, 0, 0, capacity, 0, 0], operands, places)
            return
    codes, scale = quantize(k)
    planes = split(codes)
    value, value_scale = per_token.quantize(v)
    if places is not None:
        row, head = common.corners(places)
        k_scales[row, head, places], v_scales[row, head, places] = scale[:, :, 0], value_scale[:, :, 0]
        for held, plane in zip((k_codes, k_low), planes):
            held[row, head, places // PANEL, :, places % PANEL] = plane[:, :, 0]
        v_codes[row, head, places, : v.shape[3]] = value[:, :, 0]
        return
    next_ones = length + torch.arange(count, device=k.device)
    k_scales[:, :, next_ones], v_scales[:, :, next_ones] = scale, value_scale
    for held, plane in zip((k_codes, k_low), planes):
        held[:, :, next_ones // PANEL, :, next_ones % PANEL] = plane.permute(2, 0, 1, 3)
    v_codes[:, :, next_ones, : v.shape[3]] = value


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_codes: Tensor,
    v_codes: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    k_low: Tensor,
    length: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    peak: Tensor | None,
    theta: float,
    *,
    scored: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Compute attention as `Storage.attend` says, and the peaks by which it was decided or, with `peak`, the next ones."""
    state = (k_codes, v_codes, k_scales, v_scales, k_low)
    capacity, width = k_scales.shape[2], v.shape[3]
    none = torch.zeros(k.shape[:2], dtype=torch.float32, device=k.device)

    def read(start: int, stop: int, whole: bool = True) -> tuple[Tensor, Tensor]:
        keys, values = _read(state, start, stop, whole)
        return keys, values[..., :width]

    if length.device.type == "cpu":
        tokens = int(length)
        common.check_mask(mask, q, tokens, causal, k.shape[2])
        if native.takes(q, k, v):
            if q.shape[2] > common.FEW and not softcap and not scored:
                return (*common.attend_many(q, read, k, v, tokens, mask, causal, scale), None, none)
            sizes = [tokens, tokens - k.shape[2], capacity, 0, 0]
            operands = (*state, None, None, None, peak, none)
            found = native.attend(_NAME, q, k, v, mask, sizes, operands, causal, scale, softcap, scored, theta)
            return (*found, none)
    asked = (k, v, length, mask, causal, scale, softcap)
    whole = common.attention(q, read(0, capacity), *asked)
    if q.shape[2] > common.FEW and not softcap and not scored:
        return (*whole, none)
    part = common.attention(q, read(0, capacity, False), *asked)
    needed = (_peaks(part, k) if peak is None else peak) < theta
    now = torch.where(needed & (peak is not None), _peaks(whole, k), _peaks(part, k))
    of_query = needed.repeat_interleave(q.shape[1] // k.shape[1], 1)
    out, lse, scores = (
        torch.where(of_query.view(*of_query.shape, *[1] * (x.dim() - 2)), x, y) for x, y in zip(whole, part)
    )
    return out, lse, scores, now


def _peaks(found: tuple[Tensor, Tensor, Tensor], k: Tensor) -> Tensor:
    """Return the least of the largest probabilities of each key head `[B, Hkv]`; a row that sees nothing counts as 1."""
    _, lse, scores = found
    most = torch.exp(scores.amax(-1) - lse.float()).masked_fill(lse == -math.inf, 1.0)
    return most.unflatten(1, (k.shape[1], -1)).flatten(2).amin(2)


def register() -> None:
    """Register the ops, once."""
    FORM.define(append, attend, lambda state: state[2].shape[2])
