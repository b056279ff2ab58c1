"""Define `eff::flash_v1`: dense attention that also returns the LSE, under a band and a range of keys per batch row.

LSE is what partial results are merged by, and what column sums and kept mass are computed from. The bodies here are plain
PyTorch in float32 (float64 for float64 inputs); the CUDA kernel is in codegen/triton/flash.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effcompile.ops.attention import define

NAME = "eff::flash_v1"
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? begin, Tensor? end, SymInt left, SymInt right, SymInt offset, float scale, "
    "float softcap) -> (Tensor, Tensor)"
)


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    left: int,
    right: int,
    offset: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Return (softmax(scores) v `[B, Hq, Q, Dv]` in v's dtype, LSE `[B, Hq, Q]` float32).

    q `[B, Hq, Q, D]`, k `[B, Hkv, K, D]`, v `[B, Hkv, K, Dv]`, Hq a multiple of Hkv. Query i sits at place p = i + offset
    among the keys and keeps key j iff p - left <= j <= p + right (-1: that side is open) and begin[b] <= j < end[b] (int32
    `[B]`, or None). Causal order is right = 0 with offset = K - Q, a causal window of w keys has left = w - 1 as well. A
    softcap of 0 is none. A row without keys gives 0, and -inf as its LSE.
    """
    kept = band(q.shape[0], q.shape[2], k.shape[2], begin, end, left, right, offset, q.device)
    out, lse = weighted(scores(q, k, scale, softcap).masked_fill(~kept, -math.inf), v)
    return out.to(v.dtype), lse


def wide(x: Tensor) -> Tensor:
    """Return x in the dtype that references compute in: float64 stays, all else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def scores(q: Tensor, k: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    """Return scale * q k^T `[B, Hq, Q, K]` with the softcap, KV heads repeated."""
    keys = wide(k).repeat_interleave(q.shape[1] // k.shape[1], 1)
    products = torch.matmul(wide(q), keys.transpose(-1, -2)) * scale
    return torch.tanh(products / softcap) * softcap if softcap else products


def band(
    batch: int,
    rows: int,
    columns: int,
    begin: Tensor | None,
    end: Tensor | None,
    left: int,
    right: int,
    offset: int,
    device: torch.device,
) -> Tensor:
    """Return which pairs the band and the key ranges keep, bool `[B, 1, Q, K]`."""
    places = torch.arange(rows, device=device)[:, None] + offset
    keys = torch.arange(columns, device=device)[None, :]
    kept = torch.ones(batch, 1, rows, columns, dtype=torch.bool, device=device)
    if left >= 0:
        kept = kept & (keys >= places - left)
    if right >= 0:
        kept = kept & (keys <= places + right)
    if begin is not None:
        kept = kept & (keys >= begin[:, None, None, None])
    if end is not None:
        kept = kept & (keys < end[:, None, None, None])
    return kept


def weighted(masked: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return (softmax of scores `[B, Hq, Q, K]` times the values, LSE `[B, Hq, Q]`), both wide.

    A score of -inf drops a pair; a row that has no other gives 0.
    """
    lse = torch.logsumexp(masked, -1)
    weights = torch.exp(masked - torch.where(lse == -math.inf, torch.zeros_like(lse), lse)[..., None])
    values = wide(v).repeat_interleave(masked.shape[1] // v.shape[1], 1)
    return torch.matmul(weights.to(values.dtype), values), lse


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the attention over two disjoint sets of keys from the results over each, `(O [..., Dv], LSE [...])`."""
    lse = torch.logaddexp(first[1], second[1])
    safe = torch.where(lse == -math.inf, torch.zeros_like(lse), lse)
    parts = [wide(out) * torch.exp(own - safe)[..., None] for out, own in (first, second)]
    return (parts[0] + parts[1]).to(first[0].dtype), lse


def lse_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of an LSE: float32, or float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def fake_pair(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """Return empty (output, LSE) of an attention op."""
    return v.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=lse_dtype(q))


BODIES = {NAME: flash}


def register() -> None:
    """Register the op, once."""
    define(NAME, SCHEMA, flash, fake_pair)
