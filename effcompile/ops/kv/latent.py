"""Store the latents of MLA (DeepSeek-V2, arXiv:2405.04434) as they are, or in 8 bits with a scale for each token.

What a layer keeps of a token is one latent c `[R]`, of which every head's key and value are linear functions, and one rotated key r
`[Dr]` that all heads share. Moved into the queries and behind the output, those functions leave attention with one head of keys
[c, r] and of values c. So k is the latent `[B, 1, S, R]` here, v the rotated key `[B, 1, S, Dr]`, queries are `[B, Hq, Q, R + Dr]`,
and the output is `[B, Hq, Q, R]`. Latent and rotated key have scales of their own: the first comes out of a norm, the second does
not.

All heads read the same tokens, so a piece of unpacked ones serves Hq rows of a matrix product, and unpacking costs next to nothing:
on CPU attention goes over pieces of 1,024 tokens, and unpacked latents of full size exist at no time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from effcompile.core.cache import CacheShape, State, Storage
from effcompile.ops.kv import common
from effcompile.ops.kv.per_token import FLOATS, quantize

NAMES = ("latents", "rotated", "latent_scales", "rotated_scales")
FORM = common.Form("latent", (*NAMES, "length"), outputs_keys=True)
_PIECED = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True)
class Latent(Storage):
    """Keep latents and rotated keys in 8 bits, integers or `floats`, or with `bits` 16 in the model's own dtype."""

    bits: int = 8
    floats: bool = False

    def capacity(self, tokens: int) -> int:
        """Return the tokens that are asked for."""
        return max(1, tokens)

    def tensors(self, shape: CacheShape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return codes, and scales, of which there are none in the model's own dtype."""
        lead = (shape.batch, shape.kv_heads)
        codes = shape.dtype if self.bits > 8 else torch.uint8 if self.floats else torch.int8
        scales = ((*lead, shape.capacity if self.bits == 8 else 0), torch.float16)
        return {
            "latents": ((*lead, shape.capacity, shape.head_dim), codes),
            "rotated": ((*lead, shape.capacity, shape.value_dim), codes),
            "latent_scales": scales,
            "rotated_scales": scales,
        }

    def append(self, state: State, k: Tensor, v: Tensor, places: Tensor | None = None) -> None:
        """Add tokens through `eff::kv_append_latent_v1`."""
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
        """Attend through `eff::kv_attention_latent_v1`: q `[B, Hq, Q, R + Dr]` gives `[B, Hq, Q, R]`."""
        return FORM.attend(state, (q, k, v, mask, causal, scale, softcap), (), (window, format), scored)

    def read(self, state: State, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return tokens [start, stop): latents `[B, 1, N, R]` and rotated keys `[B, 1, N, Dr]`."""
        latents, rotated = _read(tuple(state[name] for name in NAMES), start, stop)
        return latents.to(dtype), rotated.to(dtype)


def unpack(codes: Tensor, scales: Tensor) -> Tensor:
    """Return float32 of codes `[..., N, D]` with scales `[..., N]`; codes that are floats of the model's own as they are."""
    if codes.dtype not in (torch.int8, torch.uint8):
        return codes.clone()
    values = codes.view(FLOATS) if codes.dtype == torch.uint8 else codes
    return values.float() * scales.float()[..., None]


def _read(state: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, Tensor]:
    held = [x[:, :, start:stop] for x in state]
    return unpack(held[0], held[2]), unpack(held[1], held[3])


def append(
    latents: Tensor,
    rotated: Tensor,
    latent_scales: Tensor,
    rotated_scales: Tensor,
    length: Tensor,
    k: Tensor,
    v: Tensor,
    places: Tensor | None = None,
) -> None:
    """Write latents k `[B, 1, S, R]` and rotated keys v `[B, 1, S, Dr]` behind the `length` tokens that are there.

    With `places`, int64 `[B, 1]`, the one token that there is goes to those.

    Raises:
        EffError: EFF-K201 without place (on CPU; elsewhere the device checks the index), EFF-K202 for another shape or dtype.
    """
    batch, heads, capacity, rank = latents.shape
    own = latents.dtype if latents.dtype not in (torch.int8, torch.uint8) else None
    common.check_shapes((batch, heads, rank, rotated.shape[3]), k, v, own)
    if length.device.type == "cpu":
        if places is None:
            common.check_room(int(length), k.shape[2], capacity)
        else:
            common.check_places(places, k, int(length), capacity)
    at = length + torch.arange(k.shape[2], device=k.device)
    for held, scales, x in ((latents, latent_scales, k), (rotated, rotated_scales, v)):
        parts = [(held, x)] if own else list(zip((held, scales), quantize(x, held.dtype == torch.uint8)))
        for tensor, new in parts:
            if places is None:
                tensor.index_copy_(2, at, new)
            else:
                tensor[(*common.corners(places), places)] = new[:, :, 0]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    latents: Tensor,
    rotated: Tensor,
    latent_scales: Tensor,
    rotated_scales: Tensor,
    length: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    *,
    scored: bool,
) -> common.Attended:
    """Compute attention as `Storage.attend` says, with keys [latent, rotated key] and values that are the latents."""
    state = (latents, rotated, latent_scales, rotated_scales)
    new = torch.cat([k, v], 3)
    if length.device.type == "cpu":
        tokens = int(length)
        common.check_mask(mask, q, tokens, causal, k.shape[2])
        if {q.dtype, k.dtype, v.dtype} <= _PIECED and not softcap and not scored:

            def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
                both = torch.cat([x.float() for x in _read(state, start, stop)], 3)
                return both, both[..., : k.shape[3]]

            if q.shape[2] > common.FEW:
                return (*common.attend_many(q, read, new, k, tokens, mask, causal, scale), None)
            rows = q.flatten(1, 2)[:, None]
            out, lse = common.attend_many(
                rows, read, new, k, tokens, _row_mask(q, k, mask, causal, tokens), False, scale
            )
            return out[:, 0].unflatten(1, q.shape[1:3]), lse[:, 0].unflatten(1, q.shape[1:3]), None
    old = _read(state, 0, latents.shape[2])
    return common.attention(q, (torch.cat(old, 3), old[0]), new, k, length, mask, causal, scale, softcap)


def _row_mask(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, tokens: int) -> Tensor | None:
    """Return the mask `[B|1, 1, Hq * Q, tokens]` of queries that stand one head below the other as rows of one."""
    fresh, (heads, rows) = k.shape[2], q.shape[1:3]
    if causal and rows > 1:
        order = torch.ones((rows, tokens), dtype=torch.bool, device=q.device)
        order[:, tokens - fresh :] = order[:, tokens - fresh :].tril()
        if mask is None:
            mask = order[None, None]
        elif mask.dtype == torch.bool:
            mask = mask[..., :tokens] & order
        else:
            mask = mask[..., :tokens].masked_fill(~order, -math.inf)
    if mask is None:
        return None
    return mask[..., :tokens].expand(-1, heads, rows, -1).flatten(1, 2)[:, None]


def register() -> None:
    """Register the ops, once."""
    FORM.define(append, attend, lambda state: state[0].shape[2])
