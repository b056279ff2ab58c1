"""Store keys in groups of tokens per channel and values in groups of channels per token, in 4 or 2 bits (KIVI, arXiv:2402.02750).

A group x becomes round((x - zero) / scale) in [0, 2^bits - 1]. Zero is the largest half that is not above any element, scale the
least that reaches all of them, so the error is at most scale / 2. The last tokens are kept as they are, at most `residual` of them:
when one more arrives, the oldest `group` of them are packed, keys and values together. `packed` counts packed tokens; token j
that is not packed lies at place j mod residual.

Keys of a panel of 32 tokens lie as `[channel, 16]` bytes: a byte has token i in its low half and token i + 16 in its high
half (4 bits), or those two of two channels (2 bits). Values of 32 channels lie in 16 bytes in the same way: channels i and i + 16
of one token, or of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effcompile.core.cache import CacheShape, State, Storage
from effcompile.ops.kv import common, native
from effcompile.ops.kv.per_token import next_up

PANEL = 32
NAMES = ("k_codes", "v_codes", "k_scales", "v_scales", "k_zeros", "v_zeros", "k_recent", "v_recent")
FORM = common.Form("grouped", (*NAMES, "length", "packed"), ("int bits",), ("int bits",), versions=(2, 1))


@dataclass(frozen=True)
class Grouped(Storage):
    """Keep tokens in groups of `group`, a multiple of 32, with `bits` 4 or 2, and up to `residual` recent ones unpacked."""

    bits: int
    group: int
    residual: int

    def capacity(self, tokens: int) -> int:
        """Return whole groups."""
        return -(-max(1, tokens) // self.group) * self.group

    def tensors(self, shape: CacheShape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return codes, scales and zeros of the packed tokens, and the recent ones."""
        lead, tokens, bits = (shape.batch, shape.kv_heads), shape.capacity, self.bits
        keys = ((*lead, tokens // self.group, shape.head_dim), torch.float16)
        values = ((*lead, shape.value_dim // self.group, tokens), torch.float16)
        return {
            "k_codes": ((*lead, tokens // PANEL, PANEL * shape.head_dim * bits // 8), torch.uint8),
            "v_codes": ((*lead, tokens // 2, 2 * shape.value_dim * bits // 8), torch.uint8),
            "k_scales": keys,
            "v_scales": values,
            "k_zeros": keys,
            "v_zeros": values,
            "k_recent": ((*lead, self.residual, shape.head_dim), shape.dtype),
            "v_recent": ((*lead, self.residual, shape.value_dim), shape.dtype),
        }

    @property
    def counters(self) -> tuple[str, ...]:
        """Return how many tokens there are, and how many of them are packed."""
        return ("length", "packed")

    @property
    def unit(self) -> int:
        """Return a group: the keys of a group share their scales."""
        return self.group

    def append(self, state: State, k: Tensor, v: Tensor, places: Tensor | None = None) -> None:
        """Add tokens through `eff::kv_append_grouped_v2`."""
        assert places is None, "tokens of a group are dropped together"
        FORM.append(state, k, v, self.bits)

    @property
    def slack(self) -> int:
        """Return the unpacked tokens and a group that is about to be one."""
        return self.residual + self.group

    def drop(self, state: State, sinks: int, recent: float) -> None:
        """Drop groups through `eff::kv_drop_grouped_v1`."""
        tensors = (
            *(state[name] for name in NAMES),
            *(state[name] for name in ("length", "packed", "positions", "mass")),
        )
        torch.ops.eff.kv_drop_grouped_v1.default(
            *tensors, state["seen"], state["budget"], state["start"], sinks, recent
        )

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
        """Attend through `eff::kv_attention_grouped_v1`, or its form that returns the scores."""
        return FORM.attend(state, (q, k, v, mask, causal, scale, softcap), (self.bits,), (window, format), scored)

    def read(self, state: State, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return tokens [start, stop) as floats, the unpacked ones as they were."""
        found = _read(tuple(state[name] for name in NAMES), int(state["packed"]), start, stop, self.bits)
        return found[0].to(dtype), found[1].to(dtype)

    def rewind(self, state: State, length: int) -> None:
        """Forget the tokens from `length` on. Tokens of a group that is cut are unpacked; they keep the rounding that they have."""
        packed = int(state["packed"])
        if length < packed:
            whole = length // self.group * self.group
            keys, values = self.read(state, whole, length, state["k_recent"].dtype)
            places = torch.arange(whole, length, device=keys.device) % self.residual
            state["k_recent"][:, :, places], state["v_recent"][:, :, places] = keys, values
            state["packed"].fill_(whole)
        state["length"].fill_(length)

    def seek(self, state: State, places: Tensor, count: int, limit: int) -> None:
        """Go on behind what is held, or begin again; what is packed cannot be cut in compiled code."""
        super().seek(state, places, count, limit)
        state["packed"].copy_(torch.minimum(state["packed"], state["length"]))


# --- packing -------------------------------------------------------------------------------------------------------------------


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes uint8 `[..., G]`, scales, zeros float16 `[...]`) of groups x `[..., G]`."""
    wide, levels = x.float(), float(2**bits - 1)
    least, most = wide.amin(-1), wide.amax(-1)
    zero = least.half()
    zero = torch.where(zero.float() > least, _next_down(zero), zero)
    span = (most - zero.float()) / levels
    scale = span.half()
    scale = torch.where(scale.float() < span, next_up(scale), scale)
    top = torch.finfo(torch.float32).max
    sound = (least >= -top) & (most <= top)
    zero, scale = (torch.where(sound, part, torch.full_like(part, float("nan"))) for part in (zero, scale))
    by = scale.float()[..., None]
    codes = ((wide - zero.float()[..., None]) / by).round().clamp(0, levels)
    codes = torch.where((by > 0) & (by <= top), codes, torch.zeros_like(codes))
    return codes.to(torch.uint8), scale, zero


def _next_down(x: Tensor) -> Tensor:
    bits = x.view(torch.int16).int() & 0xFFFF
    moved = torch.where(
        (bits & 0x7FFF) == 0, torch.full_like(bits, 0x8001), torch.where(bits >= 0x8000, bits + 1, bits - 1)
    )
    return torch.where(moved >= 0x8000, moved - 0x10000, moved).to(torch.int16).view(torch.float16)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes `[..., 2, 32]` of two channels or tokens into bytes `[..., 4 * bits * 2]`, as the module says."""
    low, high = codes[..., :16], codes[..., 16:]
    if bits == 4:
        return (low | high << 4).flatten(-2)
    return low[..., 0, :] | high[..., 0, :] << 2 | low[..., 1, :] << 4 | high[..., 1, :] << 6


def _unpack(data: Tensor, bits: int) -> Tensor:
    """Return the codes `[..., 2, 32]` of bytes `[..., 4 * bits * 2]`."""
    if bits == 4:
        pair = data.unflatten(-1, (2, 16))
        return torch.cat([pair & 15, pair >> 4], -1)
    first, second = (torch.cat([data >> shift & 3, data >> (shift + 2) & 3], -1) for shift in (0, 4))
    return torch.stack([first, second], -2)


def _pack_group(state: tuple[Tensor, ...], first: int, k: Tensor, v: Tensor, bits: int) -> None:
    """Pack one group of tokens k `[B, Hkv, G, D]`, v `[B, Hkv, G, Dv]` to the place of token `first`."""
    k_codes, v_codes, k_scales, v_scales, k_zeros, v_zeros = state[:6]
    group, spans = k.shape[2], v.shape[3] // k.shape[2]
    codes, scale, zero = quantize(k.transpose(2, 3), bits)  # [B, Hkv, D, G]
    k_scales[:, :, first // group], k_zeros[:, :, first // group] = scale, zero
    panels = codes.unflatten(3, (-1, PANEL)).transpose(2, 3).unflatten(3, (-1, 2))  # [B, Hkv, panels, D / 2, 2, 32]
    k_codes[:, :, first // PANEL : (first + group) // PANEL] = _pack(panels, bits).flatten(3)
    codes, scale, zero = quantize(v.unflatten(3, (spans, group)), bits)  # [B, Hkv, G, spans, group]
    v_scales[:, :, :, first : first + group] = scale.transpose(2, 3)
    v_zeros[:, :, :, first : first + group] = zero.transpose(2, 3)
    runs = codes.flatten(3).unflatten(3, (-1, 32)).unflatten(2, (-1, 2))  # [B, Hkv, G / 2, 2, runs, 32]
    if bits == 4:
        data = (runs[..., :16] | runs[..., 16:] << 4).flatten(3)
    else:
        data = _pack(runs.transpose(3, 4), bits).flatten(3)
    v_codes[:, :, first // 2 : (first + group) // 2] = data


def _read_packed(state: tuple[Tensor, ...], start: int, stop: int, bits: int) -> tuple[Tensor, Tensor]:
    """Unpack tokens [start, stop), whole groups, as float32."""
    k_codes, v_codes, k_scales, v_scales, k_zeros, v_zeros, k_recent, v_recent = state
    depth, width = k_recent.shape[3], v_recent.shape[3]
    spans = v_scales.shape[2]
    group = width // spans
    panels = k_codes[:, :, start // PANEL : stop // PANEL].unflatten(3, (depth // 2, -1))
    codes = _unpack(panels, bits).flatten(3, 4).transpose(3, 4).flatten(2, 3)  # [B, Hkv, N, D]
    scale, zero = (
        x[:, :, start // group : stop // group].float().repeat_interleave(group, 2) for x in (k_scales, k_zeros)
    )
    keys = codes.float() * scale + zero
    data = v_codes[:, :, start // 2 : stop // 2]
    if bits == 4:
        pair = data.unflatten(3, (2, width // 32, 16))
        codes = torch.cat([pair & 15, pair >> 4], -1).flatten(4).flatten(2, 3)
    else:
        codes = _unpack(data.unflatten(3, (width // 32, 16)), bits).transpose(3, 4).flatten(4).flatten(2, 3)
    scale, zero = (x[..., start:stop].transpose(2, 3).float().repeat_interleave(group, 3) for x in (v_scales, v_zeros))
    return keys, codes.float() * scale + zero


def _read(state: tuple[Tensor, ...], packed: int, start: int, stop: int, bits: int) -> tuple[Tensor, Tensor]:
    k_recent, v_recent = state[6], state[7]
    group = v_recent.shape[3] // state[3].shape[2]
    parts: list[tuple[Tensor, Tensor]] = []
    if start < min(stop, packed):
        end = min(stop, packed)
        first, last = start // group * group, -(-end // group) * group
        found = _read_packed(state, first, last, bits)
        parts.append((found[0][:, :, start - first : end - first], found[1][:, :, start - first : end - first]))
    if stop > packed:
        places = torch.arange(max(start, packed), stop, device=k_recent.device) % k_recent.shape[2]
        parts.append((k_recent[:, :, places].float(), v_recent[:, :, places].float()))
    if not parts:
        return k_recent[:, :, :0].float(), v_recent[:, :, :0].float()
    return torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2)


def packed_after(packed: int, length: int, group: int, residual: int) -> int:
    """Return how many tokens are packed once there are `length`: the fewest groups that leave `residual` tokens at most."""
    return max(packed, packed + -(-(length - packed - residual) // group) * group)


# --- ops -----------------------------------------------------------------------------------------------------------------------


def append(
    k_codes: Tensor,
    v_codes: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    k_zeros: Tensor,
    v_zeros: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    length: Tensor,
    packed: Tensor,
    k: Tensor,
    v: Tensor,
    bits: int,
) -> None:
    """Add tokens k `[B, Hkv, S, D]`, v `[B, Hkv, S, Dv]`; pack the oldest unpacked groups where the recent ones get too many.

    Raises:
        EffError: EFF-K201 without place, EFF-K202 for another shape or dtype; nothing is written then.
    """
    state = (k_codes, v_codes, k_scales, v_scales, k_zeros, v_zeros, k_recent, v_recent)
    batch, heads, residual, depth = k_recent.shape
    common.check_shapes((batch, heads, depth, v_recent.shape[3]), k, v, k_recent.dtype)
    capacity, group, count = v_scales.shape[3], v_recent.shape[3] // v_scales.shape[2], k.shape[2]
    before, done = int(length), int(packed)
    common.check_room(before, count, capacity)
    after = packed_after(done, before + count, group, residual)
    if native.takes(k, v, k_recent):
        native.append(bits, k, v, [before, done, after, capacity, group, residual], state)
    else:
        keys, values = _read(state, done, done, before, bits)
        keys, values = torch.cat([keys.to(k.dtype), k], 2), torch.cat([values.to(v.dtype), v], 2)
        for first in range(done, after, group):
            part = slice(first - done, first - done + group)
            _pack_group(state, first, keys[:, :, part], values[:, :, part], bits)
        left = max(before, after)
        places = torch.arange(left, before + count, device=k.device) % residual
        k_recent[:, :, places], v_recent[:, :, places] = keys[:, :, left - done :], values[:, :, left - done :]
    packed.fill_(after)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_codes: Tensor,
    v_codes: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    k_zeros: Tensor,
    v_zeros: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    length: Tensor,
    packed: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    bits: int,
    *,
    scored: bool,
) -> common.Attended:
    """Compute attention as `Storage.attend` says."""
    state = (k_codes, v_codes, k_scales, v_scales, k_zeros, v_zeros, k_recent, v_recent)
    tokens, done, fresh = int(length), int(packed), k.shape[2]
    common.check_mask(mask, q, tokens, causal, fresh)
    if native.takes(q, k, v, k_recent):
        if q.shape[2] > common.FEW and not softcap and not scored:
            found = common.attend_many(
                q, lambda start, stop: _read(state, done, start, stop, bits), k, v, tokens, mask, causal, scale
            )
            return (*found, None)
        group = v_recent.shape[3] // v_scales.shape[2]
        sizes = [tokens, done, v_scales.shape[3], group, k_recent.shape[2]]
        return native.attend(bits, q, k, v, mask, sizes, state, causal, scale, softcap, scored)
    old = _read(state, done, 0, tokens - fresh, bits)
    out, lse, scores = common.attention(q, old, k, v, length, mask, causal, scale, softcap)
    return out, lse, common.spread(scores, v_scales.shape[3], fresh)


def register() -> None:
    """Register the ops, once."""
    FORM.define(append, attend, lambda state: state[3].shape[3])
