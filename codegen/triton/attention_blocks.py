"""Run `eff::attention_blocks_v1` and `eff::attention_epilogue_v1`, attention over a map that is known at run time, block-sparse.

The predicate is taken apart as on the CPU (`ops/row_limits.py`): a range of keys for each row and a byte for each key are what the
kernel checks in partial blocks; blocks that the predicate keeps whole need neither. A predicate with more in it, a dtype or
a block size that the kernel does not take, runs on the op's own body instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effcompile.codegen.triton import block_sparse, launch
from effcompile.codegen.triton.kernel import WORDS
from effcompile.core.expr import TRUE
from effcompile.ops import attention_blocks as op
from effcompile.ops import attention_epilogue as epilogue
from effcompile.ops.block_sparse import lists
from effcompile.ops.row_limits import split_limits, values


def attend(
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
    """Compute attention over the chosen blocks; `effcompile/ops/attention_blocks.py` says what that means."""
    if not _runs(q, v, keep, q_block, k_block):
        return op.attention_blocks(q, k, v, chosen, loads, sizes, keep, empty_row, scale, q_block, k_block)
    out, lse = _attend(q, k, v, chosen, None, None, loads, sizes, keep, scale, q_block, k_block)
    dead = torch.isneginf(lse)
    if bool(dead.any()):
        op.revive(out, dead, q, k, v, loads, sizes, keep, empty_row, scale)
    return out


def attend_epilogue(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    row_scale: Tensor | None,
    addend: Tensor | None,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    keep: str,
    empty_row: str,
    scale: float,
    q_block: int,
    k_block: int,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention with its LSE, scaled by rows and added to; `effcompile/ops/attention_epilogue.py` says what that means."""
    operands = (q, k, v, chosen, row_scale, addend, loads, sizes, keep)
    if order is not None:
        return epilogue.copied(
            attend_epilogue, operands[:6], (*operands[6:], empty_row, scale, q_block, k_block), order
        )
    if _runs(q, v, keep, q_block, k_block):
        out, lse = _attend(*operands, scale, q_block, k_block)
        if not bool(torch.isneginf(lse).any()):
            return out, lse
    return epilogue.attention_epilogue(*operands, empty_row, scale, q_block, k_block)


def _runs(q: Tensor, v: Tensor, keep: str, q_block: int, k_block: int) -> bool:
    word, width = str(q.dtype).removeprefix("torch."), max(q.shape[3], v.shape[3])
    return split_limits(keep).rest == TRUE and takes(word, width, q_block, k_block)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    row_scale: Tensor | None,
    addend: Tensor | None,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    keep: str,
    scale: float,
    q_block: int,
    k_block: int,
) -> tuple[Tensor, Tensor]:
    extents = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    every, some = op.bounds(keep, extents, (q_block, k_block), loads, sizes, q.device)
    picked = op.within(chosen, some, extents[1])
    heads = max(picked.shape[1], every.shape[1])
    picked, every = (x.repeat_interleave(heads // x.shape[1], 1) for x in (picked, every))
    limits = values(split_limits(keep), extents, loads, sizes)
    first, last, keys = (None if x is None else x.to(q.device) for x in (limits.first, limits.last, limits.keys))
    partial, full = lists(picked & ~every), lists(picked & every)
    masks = (None, None, first, last, keys, row_scale, addend)
    return block_sparse.attend(q, k, v, *partial, *full, *masks, -1, -1, 0, q_block, k_block, scale, 0.0)


def takes(dtype: str, width: int, q_block: int, k_block: int) -> bool:
    """Tell whether the kernel takes a dtype, a head dimension and a block size."""
    return dtype in WORDS and width <= launch.WIDEST and q_block % 16 == 0 and k_block % 16 == 0
