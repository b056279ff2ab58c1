"""Define estimators of block importance: pooled query-key products, and sums along antidiagonals.

Both give float32 `[B, Hq, Qb, Kb]`, one number for each pair of a query block and a key block, at a small share of the cost of
attention. A key block that the band or the key range drops whole is marked as such (-inf for scores, 0 for mass). What is done with
the numbers (top-k, coverage) is a policy's business.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.ops import flash
from effcompile.ops.attention import define

POOLED = "eff::pooled_scores_v1"
POOLED_SCHEMA = (
    "(Tensor q, Tensor k, Tensor? begin, Tensor? end, SymInt left, SymInt right, SymInt offset, int q_block, int kv_block, "
    "float scale) -> Tensor"
)
ANTIDIAGONAL = "eff::antidiagonal_mass_v1"
ANTIDIAGONAL_SCHEMA = (
    "(Tensor q, Tensor k, Tensor? begin, Tensor? end, SymInt right, SymInt offset, int q_block, int kv_block, int stride, "
    "float scale) -> Tensor"
)


def pooled_scores(
    q: Tensor,
    k: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    left: int,
    right: int,
    offset: int,
    q_block: int,
    kv_block: int,
    scale: float,
) -> Tensor:
    """Return scale * mean(queries of a block) . mean(keys of a block) `[B, Hq, Qb, Kb]`; -inf where no pair of the blocks is kept.

    q, k and the band as in `eff::flash_v1`. Means are over the rows that exist and, for keys, that lie in the key range: the
    product of the means is then exactly the mean of the pairs' scores (MInference, arXiv 2407.02490; SpargeAttn, arXiv
    2502.18137).
    """
    batch, rows, columns = q.shape[0], q.shape[2], k.shape[2]
    inside = flash.band(batch, 1, columns, begin, end, -1, -1, 0, q.device)[:, :, 0, :, None]  # [B, 1, K, 1]
    queries = _block_mean(flash.wide(q), torch.ones_like(flash.wide(q[:, :1, :, :1])), q_block)
    keys = _block_mean(torch.where(inside, flash.wide(k), 0), inside.to(flash.wide(k).dtype), kv_block)
    return flash.scores(queries, keys, scale).masked_fill(
        ~blocks_kept(batch, rows, columns, begin, end, left, right, offset, q_block, kv_block, q.device), -math.inf
    )


def _block_mean(x: Tensor, weight: Tensor, block: int) -> Tensor:
    """Return the mean over blocks of rows `[B, H, ceil(S / block), D]`; weight `[B, 1, S, 1]` says which rows count."""
    pad = (0, 0, 0, -x.shape[2] % block)
    sums = F.pad(x, pad).unflatten(2, (-1, block)).sum(3)
    return sums / F.pad(weight, pad).unflatten(2, (-1, block)).sum(3).clamp(min=1)


def blocks_kept(
    batch: int,
    rows: int,
    columns: int,
    begin: Tensor | None,
    end: Tensor | None,
    left: int,
    right: int,
    offset: int,
    q_block: int,
    kv_block: int,
    device: torch.device,
) -> Tensor:
    """Return which pairs of blocks have a pair of rows that the band keeps, bool `[B, 1, Qb, Kb]`."""
    kept = flash.band(batch, rows, columns, begin, end, left, right, offset, device)
    kept = F.pad(kept, (0, -columns % kv_block, 0, -rows % q_block))
    return kept.unflatten(3, (-1, kv_block)).any(4).unflatten(2, (-1, q_block)).any(3)


def antidiagonal_mass(
    q: Tensor,
    k: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    right: int,
    offset: int,
    q_block: int,
    kv_block: int,
    stride: int,
    scale: float,
) -> Tensor:
    """Return the estimated attention mass of each block pair `[B, Hq, Qb, Kb]`; a row adds up to 1 where every query has keys.

    Queries and keys are grouped by `stride` S, which divides both block sizes. The score of a pair of groups (n, m) is the
    mean over the antidiagonal, scale / S * sum_r q[nS + S-1-r] . k[mS + r]; rows beyond the end and keys outside [begin, end)
    count as zeros. The softmax of a group of queries runs over the groups of keys with a key in the range, of which its last
    query (at place nS + S-1 + offset) sees the first key: mS <= place + right (right -1: all). The mass of a block pair is
    the mean over the query groups in the block of the sums over the key groups in the block (XAttention, arXiv 2503.16428).
    """
    batch, rows, columns = q.shape[0], q.shape[2], k.shape[2]
    ones = flash.band(batch, 1, columns, begin, end, -1, -1, 0, q.device)[:, :, 0]
    keys = F.pad(torch.where(ones[..., None], flash.wide(k), 0), (0, 0, 0, -columns % stride))
    queries = F.pad(flash.wide(q), (0, 0, 0, -rows % stride))
    keys = keys.unflatten(2, (-1, stride)).flatten(3)
    queries = queries.unflatten(2, (-1, stride)).flip(3).flatten(3)
    groups = queries.shape[2]
    first = torch.arange(keys.shape[2], device=q.device) * stride
    place = torch.arange(groups, device=q.device) * stride + stride - 1 + offset
    kept = F.pad(ones, (0, -columns % stride)).unflatten(2, (-1, stride)).any(3)[:, :, None]
    if right >= 0:
        kept = kept & (first <= place[:, None] + right)
    masked = flash.scores(queries, keys, scale / stride).masked_fill(~kept, -math.inf)
    weights = torch.where(kept.any(-1, keepdim=True), torch.softmax(masked, -1), 0)
    per_q, per_kv = q_block // stride, kv_block // stride
    mass = F.pad(weights, (0, -keys.shape[2] % per_kv, 0, -groups % per_q))
    mass = mass.unflatten(3, (-1, per_kv)).sum(4).unflatten(2, (-1, per_q)).sum(3)
    there = F.pad(torch.ones(groups, device=q.device), (0, -groups % per_q)).unflatten(0, (-1, per_q)).sum(1)
    return mass / there[:, None]


def _fake(q: Tensor, k: Tensor, q_block: int, kv_block: int) -> Tensor:
    shape = (q.shape[0], q.shape[1], -(-q.shape[2] // q_block), -(-k.shape[2] // kv_block))
    return q.new_empty(shape, dtype=flash.lse_dtype(q))


def _fake_pooled(
    q: Tensor,
    k: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    left: int,
    right: int,
    offset: int,
    q_block: int,
    kv_block: int,
    scale: float,
) -> Tensor:
    return _fake(q, k, q_block, kv_block)


def _fake_antidiagonal(
    q: Tensor,
    k: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    right: int,
    offset: int,
    q_block: int,
    kv_block: int,
    stride: int,
    scale: float,
) -> Tensor:
    return _fake(q, k, q_block, kv_block)


BODIES = {POOLED: pooled_scores, ANTIDIAGONAL: antidiagonal_mass}


def register() -> None:
    """Register both ops, once."""
    define(POOLED, POOLED_SCHEMA, pooled_scores, _fake_pooled)
    define(ANTIDIAGONAL, ANTIDIAGONAL_SCHEMA, antidiagonal_mass, _fake_antidiagonal)
