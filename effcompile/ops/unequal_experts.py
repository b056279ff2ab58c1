"""Define `eff::unequal_experts_v1`: a large feed-forward layer for some tokens, a small one for others, none for the rest.

Duo-LLM's layers (arXiv:2410.10846): y[t] = F_c(x[t]), c = choice[t]: 0 the large one, 1 the small one, else 0. Both are SwiGLU
without bias, of different inner widths. The reference way runs both on every token and masks; the op runs each on its own tokens,
a few of them by the C++ kernel of experts, which neither moves them nor asks the BLAS for products of a few rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.ops import native_moe
from effcompile.ops.attention import define

NAME = "eff::unequal_experts_v1"
SCHEMA = "(Tensor x, Tensor choice, Tensor gate0, Tensor up0, Tensor down0, Tensor gate1, Tensor up1, Tensor down1) -> Tensor"


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return down(silu(gate x) * (up x)) for x `[..., C]`, gate and up `[I, C]`, down `[C, I]`."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def written(
    x: Tensor, choice: Tensor, gate0: Tensor, up0: Tensor, down0: Tensor, gate1: Tensor, up1: Tensor, down1: Tensor
) -> Tensor:
    """Compute both layers for every token x `[..., C]` and take by choice `[...]`: how the reference masks."""
    which = choice[..., None]
    small = torch.where(which == 1, swiglu(x, gate1, up1, down1), 0.0)
    return torch.where(which == 0, swiglu(x, gate0, up0, down0), small)


def unequal_experts(
    x: Tensor, choice: Tensor, gate0: Tensor, up0: Tensor, down0: Tensor, gate1: Tensor, up1: Tensor, down1: Tensor
) -> Tensor:
    """Compute the same on the tokens of each layer; reads on the host how many they are.

    Where all tokens choose alike nothing is moved, so that the result is bit for bit that of the layer alone.

    Raises:
        EffError: EFF-M210 for shapes that do not fit each other.
    """
    check(x, choice, gate0, up0, down0, gate1, up1, down1)
    flat, picked = x.reshape(-1, x.shape[-1]).contiguous(), choice.reshape(-1)
    layers = ((gate0, up0, down0), (gate1, up1, down1))
    chosen = [picked == number for number in range(2)]
    counts = [int(mask.sum()) for mask in chosen]
    out = torch.zeros(flat.shape, dtype=x.dtype, device=x.device)
    for mask, count, layer in zip(chosen, counts, layers):
        if count == len(flat):
            return swiglu(flat, *layer).reshape(x.shape)
        if not count:
            continue
        if count <= native_moe.FEW_ROWS and native_moe.adds(flat, *layer):
            ids, share = torch.where(mask, 0, -1)[:, None], flat.new_ones((len(flat), 1))
            native_moe.add_swiglu(out, flat, ids, share, layer[0][None], layer[1][None], layer[2][None])
        else:
            tokens = mask.nonzero().squeeze(1)
            out.index_copy_(0, tokens, swiglu(flat[tokens], *layer))
    return out.reshape(x.shape)


def check(
    x: Tensor, choice: Tensor, gate0: Tensor, up0: Tensor, down0: Tensor, gate1: Tensor, up1: Tensor, down1: Tensor
) -> None:
    """Raise EFF-M210 unless the weights fit each other and the tokens; token counts are not compared."""
    wide = x.shape[-1]
    fits = choice.dim() == x.dim() - 1
    for gate, up, down in ((gate0, up0, down0), (gate1, up1, down1)):
        inner = gate.shape[0]
        fits = fits and gate.shape == up.shape == (inner, wide) and down.shape == (wide, inner)
    if not fits:
        shapes = [list(t.shape) for t in (x, choice, gate0, up0, down0, gate1, up1, down1)]
        raise EffError("EFF-M210", f"operands of a large and a small layer: {shapes}")


def _fake(x: Tensor, choice: Tensor, *weights: Tensor) -> Tensor:
    check(x, choice, *weights)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def register() -> None:
    """Register the op, once."""
    define(NAME, SCHEMA, unequal_experts, _fake)
