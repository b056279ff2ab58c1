"""Define `eff::attention_tiled_v1`: exact attention under a predicate on the C++ kernel of block maps.

The kernel skips blocks of which the predicate keeps nothing, and applies it inside a block only where it cuts one, so no Q x K
tensor exists. Where no C++ compiler is at hand the op runs torch's flash attention block by block (`blocks.py`). It is opaque to
TorchInductor: which blocks are read may be data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.core.expr import TRUE
from effcompile.core.expr_eval import from_json
from effcompile.ops import native
from effcompile.ops.attention import define
from effcompile.ops.attention_blocks import compiled
from effcompile.ops.blocks import attention_blocked, empty_rows
from effcompile.ops.sinks import flash_cpu, gate

NAME = "eff::attention_tiled_v1"
Q_BLOCK = 128
K_BLOCK = 64


def attention_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    keep: str,
    empty_row: str,
    scale: float,
) -> Tensor:
    """Compute attention under a predicate.

    q `[B, Hq, Q, D]`, k `[B, Hkv, K, D]`, v `[B, Hkv, K, Dv]`, sinks `[Hq]`; `keep` is the predicate over `loads` and `sizes`. An
    empty row gives 0, or the mean of V where `empty_row` is "uniform", of which a sink leaves nothing. Returns `[B, Hq, Q, Dv]`,
    laid out as `[B, Q, Hq, Dv]`: what reads it joins the heads.
    """
    out = _fake(q, k, v)
    if not native.runs(native.BLOCKS, q, k, v) or 0 in (*q.shape, k.shape[2]):
        return out.copy_(_composed(q, k, v, sinks, loads, sizes, keep, empty_row, scale))
    grid = torch.ones((1, 1, -(-q.shape[2] // Q_BLOCK), -(-k.shape[2] // K_BLOCK)), dtype=torch.bool)
    _, lse = compiled(q, k, v, grid, loads, sizes, keep, scale, Q_BLOCK, K_BLOCK, out)
    if sinks is not None:
        out.mul_(gate(lse, sinks))
    if from_json(keep) != TRUE:
        dead = lse == -math.inf
        if bool(dead.any()):
            # Assigned, not chosen by `where`, which is free to lay out its result in another way.
            out.copy_(torch.where(dead[..., None], empty_rows(v, q.shape[1] // k.shape[1], empty_row, sinks), out))
    return out


def _composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    keep: str,
    empty_row: str,
    scale: float,
) -> Tensor:
    if from_json(keep) != TRUE:
        return attention_blocked(q, k, v, sinks, loads, sizes, keep, empty_row, scale)
    if sinks is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    out, lse = flash_cpu(q, k, v, None, False, scale)
    return (out * gate(lse, sinks)).to(q.dtype)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


def register() -> None:
    """Register the op, once."""
    define(
        NAME,
        "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor[] loads, SymInt[] sizes, str keep, str empty_row, float scale) "
        "-> Tensor",
        attention_tiled,
        _fake,
    )
