"""Define the two halves of a mixture of experts with capacity: tokens into places of experts, and results back.

    eff::moe_encode_v1   y[ids[s, j], places[s, j]] += scale[s, j] * x[s]
    eff::moe_decode_v1   out[s] = sum over j of weights[s, j] * y[ids[s, j], places[s, j]]

They are what one-hot einsums over [S, E, C] compute (GShard, arXiv:2006.16668), at a cost in the number of tokens instead of its
square (Tutel, arXiv:2206.03382). A slot whose scale or weight is 0, or whose place is outside, contributes nothing: it is not
multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.ops.attention import define

ENCODE, DECODE = "eff::moe_encode_v1", "eff::moe_decode_v1"
_ENCODE = "(Tensor x, Tensor ids, Tensor places, Tensor scale, SymInt experts, SymInt capacity) -> Tensor"
_DECODE = "(Tensor y, Tensor ids, Tensor places, Tensor weights) -> Tensor"


def encode(x: Tensor, ids: Tensor, places: Tensor, scale: Tensor, experts: int, capacity: int) -> Tensor:
    """Return tokens by expert `[E, C, M]`; x `[S, M]`, ids and places `[S, k]` integers, scale `[S, k]` in x's dtype.

    Raises:
        EffError: EFF-M201 for operands that do not fit each other.
    """
    _check("scale", scale, ids, places, x.shape[0])
    if isinstance(capacity, int) and capacity < 1:
        raise EffError("EFF-M201", f"experts of a capacity of {capacity}", hint="a capacity of one token or more")
    inside = (scale != 0) & (ids >= 0) & (ids < experts) & (places >= 0) & (places < capacity)
    cells = torch.where(inside, ids * capacity + places, experts * capacity)  # one more cell takes what is dropped
    made = x.new_zeros(experts * capacity + 1, x.shape[1])
    for slot in range(ids.shape[1]):
        made = made.index_add(0, cells[:, slot], torch.where(inside[:, slot, None], x * scale[:, slot, None], 0.0))
    return made[:-1].view(experts, capacity, x.shape[1])


def decode(y: Tensor, ids: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Return results by token `[S, M]`; y `[E, C, M]`, ids and places `[S, k]` integers, weights `[S, k]` in y's dtype.

    Raises:
        EffError: EFF-M201 for operands that do not fit each other.
    """
    _check("weights", weights, ids, places, ids.shape[0])
    experts, capacity, _ = y.shape
    inside = (weights != 0) & (ids >= 0) & (ids < experts) & (places >= 0) & (places < capacity)
    cells = torch.where(inside, ids * capacity + places, 0)
    kind = torch.promote_types(y.dtype, torch.float32)
    rows = y.reshape(experts * capacity, -1)[cells].to(kind)  # [S, k, M]
    return torch.where(inside[..., None], rows * weights[..., None].to(kind), 0.0).sum(1).to(y.dtype)


def _check(name: str, factor: Tensor, ids: Tensor, places: Tensor, tokens: int) -> None:
    shapes = [list(t.shape) for t in (factor, ids, places)]
    if any(t.dim() != 2 for t in (factor, ids, places)) or ids.is_floating_point() or places.is_floating_point():
        raise EffError("EFF-M201", f"{name}, ids and places are {shapes}", hint=f"{name}, ids and places [S, k]")
    known = [size for shape in shapes for size in shape[:1] if isinstance(size, int)]
    if len(set(known)) > 1 or (known and isinstance(tokens, int) and known[0] != tokens):
        raise EffError("EFF-M201", f"{name}, ids and places are {shapes} for {tokens} tokens", hint="[S, k] each")


def _encode_fake(x: Tensor, ids: Tensor, places: Tensor, scale: Tensor, experts: int, capacity: int) -> Tensor:
    _check("scale", scale, ids, places, x.shape[0])
    return x.new_empty(experts, capacity, x.shape[1])


def _decode_fake(y: Tensor, ids: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    _check("weights", weights, ids, places, ids.shape[0])
    return y.new_empty(ids.shape[0], y.shape[2])


def register() -> None:
    """Register the ops, once."""
    define(ENCODE, _ENCODE, encode, _encode_fake)
    define(DECODE, _DECODE, decode, _decode_fake)
