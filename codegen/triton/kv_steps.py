"""Run attention of a few new queries over the caches of every packed form: the launches of `eff::kv_attention_*` on GPUs.

`kv_packed.py` attends over what is packed. What is not, the tokens of the call and the last ones of a grouped or mixed cache, are
few: plain operations attend over them, and both results are merged by their LSE. Calls that the kernel does not take run the ops'
own bodies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from effcompile.codegen.triton import launch
from effcompile.codegen.triton.kernel import WORDS
from effcompile.codegen.triton.kv_packed import FLOATS, KERNELS, PLANES, ROWS4, ROWS8, Packed, over
from effcompile.ops import flash
from effcompile.ops.kv import common, fixed, grouped, mixed, per_token, scores, two_plane

__all__ = ["KERNELS"]


def attend_token8(*given: Any, splits: int = 0) -> tuple[Tensor, Tensor]:
    """Run `eff::kv_attention_token8_v1` (see effcompile/ops/kv/per_token.py) with the kernels where they take it."""
    call = per_token.FORM.call(given)
    if not _takes(call):
        return per_token.attend(*call.given, scored=False)[:2]
    bits = FLOATS if call.state["k_codes"].dtype == torch.uint8 else 8
    return _merged(call.q, _over(call, _packed(call, bits, call.state["k_scales"].shape[2]), splits), _new(call))


def attend_rows(*given: Any, splits: int = 0) -> tuple[Tensor, Tensor]:
    """Run `eff::kv_attention_rows_v1` (see effcompile/ops/kv/fixed.py) with the kernels where they take it."""
    call = fixed.FORM.call(given)
    if not _takes(call):
        return fixed.attend(*call.given, scored=False)[:2]
    codes = call.state["k_codes"]
    state = _packed(call, ROWS8 if codes.dtype == torch.int8 else ROWS4, codes.shape[2])
    return _merged(call.q, _over(call, state, splits), _new(call))


def attend_planes(*given: Any, splits: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Run `eff::kv_attention_planes_v1` (see effcompile/ops/kv/two_plane.py) with the kernels where they take it.

    No number comes back to the host: without `peak` a second launch reads both planes, and of other heads nothing.
    """
    call = two_plane.FORM.call(given)
    if not _takes(call):
        out, lse, _, now = two_plane.attend(*call.given, scored=False)
        return out, lse, now
    q, kv_heads, peak, theta = call.q, call.k.shape[1], call.settings["peak"], call.settings["theta"]
    state = replace(_packed(call, PLANES, call.state["k_scales"].shape[2]), low=call.state["k_low"])
    rest = _new(call)

    def run(planes: int, by: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        *old, largest = _over(call, state, splits, planes=planes, peak=by, theta=theta)
        out, lse = _merged(q, (old[0], old[1], None), rest)
        assert largest is not None
        return out, lse, _peaks(torch.maximum(largest, rest[2].amax(-1)), lse, kv_heads)

    out, lse, now = run(0 if peak is None else 2, peak)
    if peak is None and theta > 0:
        needed = (now < theta).repeat_interleave(q.shape[1] // kv_heads, 1)[..., None]
        more, norm, _ = run(1, now)
        out, lse = torch.where(needed[..., None], more, out), torch.where(needed, norm, lse)
    return out, lse, now


def _peaks(largest: Tensor, lse: Tensor, kv_heads: int) -> Tensor:
    """Return the least of the largest probabilities of each key head `[B, Hkv]`; a row that sees nothing counts as 1."""
    found = torch.exp(largest - lse.float()).masked_fill(lse == -torch.inf, 1.0)
    return found.unflatten(1, (kv_heads, -1)).flatten(2).amin(2)


def attend_grouped(*given: Any, splits: int = 0) -> tuple[Tensor, Tensor]:
    """Run `eff::kv_attention_grouped_v1` (see effcompile/ops/kv/grouped.py) with the kernels where they take it."""
    call = grouped.FORM.call(given)
    if not _takes(call):
        return grouped.attend(*call.given, scored=False)[:2]
    q, k, state, mask = call.q, call.k, call.state, call.mask
    k_recent, v_recent = state["k_recent"], state["v_recent"]
    done = torch.minimum(state["packed"], call.before)
    # Slot s of the unpacked tokens holds the token from there on that is s modulo their number; put in order, they are a cache.
    slots = (done + torch.arange(k_recent.shape[2], device=q.device)) % k_recent.shape[2]
    recent = (k_recent.index_select(2, slots), v_recent.index_select(2, slots))
    own = None
    if mask is not None:
        columns = done + torch.arange(k_recent.shape[2] + k.shape[2], device=q.device)
        own = mask.index_select(3, columns.clamp(max=mask.shape[3] - 1))
    asked = (own, call.causal, call.scale, call.softcap)
    rest = common.attention(q, recent, k, call.v, state["length"] - done, *asked)
    packed = replace(
        _packed(call, call.settings["bits"], state["v_scales"].shape[3]),
        zeros=(state["k_zeros"], state["v_zeros"]),
        span=v_recent.shape[3] // state["v_scales"].shape[2],
    )
    return _merged(q, _over(call, packed, splits, before=done), rest)


def attend_mixed(*given: Any, splits: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Run `eff::kv_attention_mixed_v1` (see effcompile/ops/kv/mixed.py): both parts by the kernel, the last tokens beside them."""
    q, k, v, parts, (k_recent, v_recent, length, seen, mask, causal, scale, softcap, high, low, *_) = mixed.operands(
        given
    )
    if not _knows(q, k, v, mask):
        return mixed.attend(*given)
    own = None
    if mask is not None:
        columns = seen - length + torch.arange(k_recent.shape[2] + k.shape[2], device=q.device)
        own = mask.index_select(3, columns.clamp(max=mask.shape[3] - 1))
    out, lse, logits = common.attention(q, (k_recent, v_recent), k, v, length + k.shape[2], own, causal, scale, softcap)
    none = (k[:, :, :0], v[:, :, :0])
    found = (out.float(), lse.float())
    for part, bits in zip(parts, (high, low)):
        places = part[-1] if mask is None else part[-1].clamp(max=mask.shape[3] - 1)
        seen_by = mixed.of_places(mask, places, q)
        other, norm = attend_grouped(q, *none, *part[:-1], seen_by, False, scale, softcap, bits, splits=splits)
        found = flash.merge(found, (other.float(), norm.float()))
    return found[0].to(q.dtype), found[1], scores.gained(logits, found[1], k.shape[1])


def _takes(call: common.Call) -> bool:
    """Tell whether the kernel runs a call: a few queries, a mask of bool, and dimensions and dtypes that it knows."""
    return _knows(call.q, call.k, call.v, call.mask)


def _knows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    rows, widest = q.shape[2] * (q.shape[1] // k.shape[1]), max(q.shape[3], v.shape[3])
    known = str(q.dtype).removeprefix("torch.") in WORDS and k.dtype == q.dtype
    return rows <= 128 and widest <= launch.WIDEST and known and (mask is None or mask.dtype == torch.bool)


def _packed(call: common.Call, bits: int, capacity: int) -> Packed:
    """Return the codes and scales of a state as the kernel takes them."""
    return Packed(bits, capacity, *(call.state[name] for name in ("k_codes", "v_codes", "k_scales", "v_scales")))


def _over(
    call: common.Call, state: Packed, splits: int, *, before: Tensor | None = None, **more: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attend over the tokens that were packed before the call."""
    old = call.before if before is None else before
    return over(call.q, call.v.shape[3], state, old, call.mask, call.scale, call.softcap, splits, **more)


def _new(call: common.Call) -> tuple[Tensor, Tensor, Tensor]:
    """Attend over the tokens of the call alone."""
    none = (call.k[:, :, :0], call.v[:, :, :0])
    asked = (call.mask, call.causal, call.scale, call.softcap)
    return common.attention(call.q, none, call.k, call.v, call.state["length"], *asked)


def _merged(
    q: Tensor, old: tuple[Tensor, Tensor, Tensor | None], rest: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    out, lse = flash.merge(old[:2], (rest[0].float(), rest[1].float()))
    return out.to(q.dtype), lse
