"""Run attention of a few new queries over the caches of every packed form: the launches of `eff::kv_attention_*` on GPUs.

`kv_packed.py` attends over what is packed. What is not, the tokens of the call and the last ones of a grouped or mixed cache, are
few: plain operations attend over them, and both results are merged by their LSE. Calls that the kernel does not take run the ops'
own bodies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from effcompile.codegen.triton import launch
from effcompile.codegen.triton.kernel import WORDS
from effcompile.codegen.triton.kv_packed import FLOATS, KERNELS, PLANES, ROWS4, ROWS8, Packed, over
from effcompile.ops import flash
from effcompile.ops.kv import common, fixed, grouped, mixed, per_token, scores, two_plane

__all__ = ["KERNELS"]


def attend_token8(
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
    window: int = 0,
    format: str = "",
    *,
    splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run `eff::kv_attention_token8_v1` (see effcompile/ops/kv/per_token.py) with the kernels where they take it."""
    if not _takes(q, k, v, mask):
        whole = (q, k, v, k_codes, v_codes, k_scales, v_scales, length, mask, causal, scale, softcap)
        return per_token.attend(*whole, scored=False)[:2]
    bits = FLOATS if k_codes.dtype == torch.uint8 else 8
    state = Packed(bits, k_scales.shape[2], k_codes, v_codes, k_scales, v_scales)
    rest = _new(q, k, v, length, mask, causal, scale, softcap)
    return _merged(q, over(q, v.shape[3], state, length - k.shape[2], mask, scale, softcap, splits), rest)


def attend_rows(
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
    window: int = 0,
    format: str = "",
    *,
    splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run `eff::kv_attention_rows_v1` (see effcompile/ops/kv/fixed.py) with the kernels where they take it."""
    if not _takes(q, k, v, mask):
        whole = (q, k, v, k_codes, v_codes, k_scales, v_scales, length, mask, causal, scale, softcap)
        return fixed.attend(*whole, scored=False)[:2]
    state = Packed(
        ROWS8 if k_codes.dtype == torch.int8 else ROWS4, k_codes.shape[2], k_codes, v_codes, k_scales, v_scales
    )
    rest = _new(q, k, v, length, mask, causal, scale, softcap)
    return _merged(q, over(q, v.shape[3], state, length - k.shape[2], mask, scale, softcap, splits), rest)


def attend_planes(
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
    window: int = 0,
    format: str = "",
    *,
    splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `eff::kv_attention_planes_v1` (see effcompile/ops/kv/two_plane.py) with the kernels where they take it.

    No number comes back to the host: without `peak` a second launch reads both planes, and of other heads nothing.
    """
    if not _takes(q, k, v, mask):
        whole = (
            q,
            k,
            v,
            k_codes,
            v_codes,
            k_scales,
            v_scales,
            k_low,
            length,
            mask,
            causal,
            scale,
            softcap,
            peak,
            theta,
        )
        out, lse, _, now = two_plane.attend(*whole, scored=False)
        return out, lse, now
    state = Packed(PLANES, k_scales.shape[2], k_codes, v_codes, k_scales, v_scales, low=k_low)
    rest = _new(q, k, v, length, mask, causal, scale, softcap)
    asked: tuple[Any, ...] = (q, v.shape[3], state, length - k.shape[2], mask, scale, softcap, splits)

    def run(planes: int, by: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        *old, largest = over(*asked, planes=planes, peak=by, theta=theta)
        out, lse = _merged(q, (old[0], old[1], None), rest)
        assert largest is not None
        return out, lse, _peaks(torch.maximum(largest, rest[2].amax(-1)), lse, k.shape[1])

    out, lse, now = run(0 if peak is None else 2, peak)
    if peak is None and theta > 0:
        needed = (now < theta).repeat_interleave(q.shape[1] // k.shape[1], 1)[..., None]
        more, norm, _ = run(1, now)
        out, lse = torch.where(needed[..., None], more, out), torch.where(needed, norm, lse)
    return out, lse, now


def _peaks(largest: Tensor, lse: Tensor, kv_heads: int) -> Tensor:
    """Return the least of the largest probabilities of each key head `[B, Hkv]`; a row that sees nothing counts as 1."""
    found = torch.exp(largest - lse.float()).masked_fill(lse == -torch.inf, 1.0)
    return found.unflatten(1, (kv_heads, -1)).flatten(2).amin(2)


def attend_grouped(
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
    window: int = 0,
    format: str = "",
    *,
    splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run `eff::kv_attention_grouped_v1` (see effcompile/ops/kv/grouped.py) with the kernels where they take it."""
    if not _takes(q, k, v, mask):
        held = (k_codes, v_codes, k_scales, v_scales, k_zeros, v_zeros, k_recent, v_recent)
        rest_of: tuple[Any, ...] = (length, packed, mask, causal, scale, softcap, bits)
        return grouped.attend(q, k, v, *held, *rest_of, scored=False)[:2]
    before = length - k.shape[2]
    done, capacity = torch.minimum(packed, before), v_scales.shape[3]
    span = v_recent.shape[3] // v_scales.shape[2]
    # Slot s of the unpacked tokens holds the token from there on that is s modulo their number; put in order, they are a cache.
    slots = (done + torch.arange(k_recent.shape[2], device=q.device)) % k_recent.shape[2]
    recent = (k_recent.index_select(2, slots), v_recent.index_select(2, slots))
    own = None
    if mask is not None:
        columns = done + torch.arange(k_recent.shape[2] + k.shape[2], device=q.device)
        own = mask.index_select(3, columns.clamp(max=mask.shape[3] - 1))
    rest = common.attention(q, recent, k, v, length - done, own, causal, scale, softcap)
    state = Packed(bits, capacity, k_codes, v_codes, k_scales, v_scales, (k_zeros, v_zeros), span)
    return _merged(q, over(q, v.shape[3], state, done, mask, scale, softcap, splits), rest)


def attend_mixed(*given: Any, splits: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Run `eff::kv_attention_mixed_v1` (see effcompile/ops/kv/mixed.py): both parts by the kernel, the last tokens beside them."""
    q, k, v, parts, (k_recent, v_recent, length, seen, mask, causal, scale, softcap, high, low, *_) = mixed.operands(
        given
    )
    if not _takes(q, k, v, mask):
        return mixed.attend(*given)
    own = None
    if mask is not None:
        columns = seen - length + torch.arange(k_recent.shape[2] + k.shape[2], device=q.device)
        own = mask.index_select(3, columns.clamp(max=mask.shape[3] - 1))
    out, lse, logits = common.attention(q, (k_recent, v_recent), k, v, length + k.shape[2], own, causal, scale, softcap)
    none = (k[:, :, :0], v[:, :, :0])
    found, grouped_launch = (out.float(), lse.float()), cast("Callable[..., tuple[Tensor, Tensor]]", attend_grouped)
    for part, bits in zip(parts, (high, low)):
        places = part[-1] if mask is None else part[-1].clamp(max=mask.shape[3] - 1)
        seen_by = mixed.of_places(mask, places, q)
        other, norm = grouped_launch(q, *none, *part[:-1], seen_by, False, scale, softcap, bits, splits=splits)
        found = flash.merge(found, (other.float(), norm.float()))
    return found[0].to(q.dtype), found[1], scores.gained(logits, found[1], k.shape[1])


def _takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Tell whether the kernel runs a call: a few queries, a mask of bool, and dimensions and dtypes that it knows."""
    rows, widest = q.shape[2] * (q.shape[1] // k.shape[1]), max(q.shape[3], v.shape[3])
    known = str(q.dtype).removeprefix("torch.") in WORDS and k.dtype == q.dtype
    return rows <= 128 and widest <= launch.WIDEST and known and (mask is None or mask.dtype == torch.bool)


def _new(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend over the tokens of the call alone."""
    return common.attention(q, (k[:, :, :0], v[:, :, :0]), k, v, length, mask, causal, scale, softcap)


def _merged(
    q: Tensor, old: tuple[Tensor, Tensor, Tensor | None], rest: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    out, lse = flash.merge(old[:2], (rest[0].float(), rest[1].float()))
    return out.to(q.dtype), lse
