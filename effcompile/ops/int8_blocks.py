"""Define `eff::int8_blocks_v1`: attention over a block map with query-key products of 8-bit integers.

What `eff::int8_attention_v1` is to dense attention, this is to `eff::attention_blocks_v1`: keys lose their mean, which no softmax
sees, queries and keys are rounded with one scale for each block of rows, and the map and the predicate decide what is computed
(SageAttention, arXiv:2410.02367; SpargeAttn, arXiv:2502.18137, has both). Keys that the predicate drops for all queries may hold
anything: they count neither in the mean nor in a scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effcompile.ops import flash
from effcompile.ops.attention import define
from effcompile.ops.attention_blocks import attention_blocks
from effcompile.ops.int8_attention import K_BLOCK, Q_BLOCK, quantized
from effcompile.ops.row_limits import split_limits, values

NAME = "eff::int8_blocks_v1"


def int8_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    keep: str,
    empty_row: str,
    scale: float,
    q_block: int,
    k_block: int,
) -> Tensor:
    """Compute attention over the chosen blocks with rounded products; operands and result as in `eff::attention_blocks_v1`.

    A block of queries that shares a scale is 128 rows, of keys 64, whatever the blocks of the map are.
    """
    real = values(split_limits(keep), (*q.shape[:3], k.shape[2]), loads, sizes).keys
    keys, key_scale = quantized(centered(k, None if real is None else real.to(k.device)), K_BLOCK)
    queries, query_scale = quantized(q, Q_BLOCK)
    rounded = (queries * query_scale, keys * key_scale, flash.wide(v))
    return attention_blocks(*rounded, chosen, loads, sizes, keep, empty_row, scale, q_block, k_block).to(v.dtype)


def centered(k: Tensor, real: Tensor | None) -> Tensor:
    """Return the keys `[B, Hkv, K, D]` minus their mean over the real ones `[B|1, K]`, in float32 or more; the others are 0."""
    wide = flash.wide(k)
    if real is None:
        return wide - wide.mean(2, keepdim=True)
    inside = real.bool()[:, None, :, None]
    wide = torch.where(inside, wide, 0)
    mean = wide.sum(2, keepdim=True) / inside.sum(2, keepdim=True).clamp(min=1)
    return torch.where(inside, wide - mean, 0)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return v.new_empty((*q.shape[:3], v.shape[3]))


def register() -> None:
    """Register the op, once."""
    define(
        NAME,
        "(Tensor q, Tensor k, Tensor v, Tensor chosen, Tensor[] loads, SymInt[] sizes, str keep, str empty_row, float scale, "
        "int q_block, int k_block) -> Tensor",
        int8_blocks,
        _fake,
    )
