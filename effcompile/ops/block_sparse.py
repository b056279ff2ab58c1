"""Define `eff::block_sparse_v1`: attention over lists of key blocks in FlexAttention's format, with LSE and an epilogue.

Block (a, b) holds queries a * q_block ... and keys b * kv_block ... . A *partial* block is subject to the band and the key
ranges, a *full* block is not; a block in neither list is dropped. The epilogue, O * row_scale + addend, is what replays a
cached residual (Re-ttention, arXiv 2505.22918) without another pass over the output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effcompile.ops import flash
from effcompile.ops.attention import define

NAME = "eff::block_sparse_v1"
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor kv_num_blocks, Tensor kv_indices, Tensor? full_kv_num_blocks, Tensor? full_kv_indices, "
    "Tensor? begin, Tensor? end, Tensor? row_first, Tensor? row_last, Tensor? key_mask, Tensor? row_scale, Tensor? addend, "
    "SymInt left, SymInt right, SymInt offset, int q_block, int kv_block, float scale, float softcap) -> (Tensor, Tensor)"
)


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    full_kv_num_blocks: Tensor | None,
    full_kv_indices: Tensor | None,
    begin: Tensor | None,
    end: Tensor | None,
    row_first: Tensor | None,
    row_last: Tensor | None,
    key_mask: Tensor | None,
    row_scale: Tensor | None,
    addend: Tensor | None,
    left: int,
    right: int,
    offset: int,
    q_block: int,
    kv_block: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Return (O * row_scale + addend `[B, Hq, Q, Dv]`, LSE `[B, Hq, Q]` of the kept keys).

    q, k, v and the band as in `eff::flash_v1`. kv_num_blocks `[B', H', Qb]` and kv_indices `[B', H', Qb, Kb']` int32 list the
    partial blocks of each query block, full_kv_* the full ones; a pair of blocks is in at most one list. B' is 1 or B, H'
    divides Hq. In partial blocks a row keeps the keys of row_first <= key <= row_last (int32 `[B|1, Q]`) whose byte in
    key_mask (uint8 `[B|1, K]`) is not 0, where these are given. row_scale `[B, Hq, Q]` float32 and addend
    `[B, Hq, Q, Dv]` may each be None.
    """
    batch, heads, rows, columns = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    count = -(-columns // kv_block)
    kept = spread(listed(kv_num_blocks, kv_indices, count), heads, rows, columns, q_block, kv_block)
    kept = kept & flash.band(batch, rows, columns, begin, end, left, right, offset, q.device)
    keys = torch.arange(columns, device=q.device)
    if row_first is not None:
        kept = kept & (keys >= row_first[:, None, :, None])
    if row_last is not None:
        kept = kept & (keys <= row_last[:, None, :, None])
    if key_mask is not None:
        kept = kept & (key_mask != 0)[:, None, None, :]
    if full_kv_num_blocks is not None and full_kv_indices is not None:
        whole = listed(full_kv_num_blocks, full_kv_indices, count)
        kept = kept | spread(whole, heads, rows, columns, q_block, kv_block)
    out, lse = flash.weighted(flash.scores(q, k, scale, softcap).masked_fill(~kept, -math.inf), v)
    if row_scale is not None:
        out = out * row_scale[..., None]
    if addend is not None:
        out = out + flash.wide(addend)
    return out.to(v.dtype), lse


def listed(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Return the map `[B', H', Qb, blocks]` bool that the lists spell; entries past the count are ignored."""
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    places = torch.where(used, indices, blocks).long()
    chosen = torch.zeros((*indices.shape[:-1], blocks + 1), dtype=torch.bool, device=indices.device)
    return chosen.scatter(-1, places, True)[..., :blocks]


def spread(chosen: Tensor, heads: int, rows: int, columns: int, q_block: int, kv_block: int) -> Tensor:
    """Return the pairs `[B', Hq, Q, K]` in the blocks of a map `[B', H', Qb, Kb]`."""
    wide = chosen.repeat_interleave(heads // chosen.shape[1], 1).repeat_interleave(q_block, 2)
    return wide.repeat_interleave(kv_block, 3)[:, :, :rows, :columns]


def lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return (counts `[B', H', Qb]`, indices `[B', H', Qb, Kb]`) int32 of a map: chosen blocks first, in ascending order."""
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return chosen.sum(-1).to(torch.int32), order.contiguous()


BODIES = {NAME: block_sparse}


def register() -> None:
    """Register the op, once."""
    define(NAME, SCHEMA, block_sparse, flash.fake_pair)
