"""Define scores of single keys: how much attention each key gets, from all rows or from a few probe rows.

They feed vertical patterns (MInference, arXiv 2407.02490), cache eviction (H2O, SnapKV) and token pruning (SpAtten, arXiv
2012.09852; ZipVL, arXiv 2410.08584). Nothing of size Q x K is ever stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effcompile.ops import flash
from effcompile.ops.attention import define

COLUMN_SUMS = "eff::column_sums_v1"
COLUMN_SUMS_SCHEMA = (
    "(Tensor q, Tensor k, Tensor lse, Tensor? begin, Tensor? end, SymInt left, SymInt right, SymInt offset, float scale, "
    "float softcap) -> Tensor"
)
PROBE = "eff::probe_scores_v1"
PROBE_SCHEMA = (
    "(Tensor q, Tensor k, Tensor? begin, Tensor? end, SymInt left, SymInt right, SymInt offset, float scale, float softcap) "
    "-> (Tensor, Tensor)"
)


def column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    left: int,
    right: int,
    offset: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Return a_j = sum over rows of exp(score_ij - LSE_i) `[B, Hq, K]` float32, over the pairs that the band keeps.

    q, k and the band as in `eff::flash_v1`; lse `[B, Hq, Q]` of the same rows, whose -inf marks a row without keys. With the LSE of
    attention over the same pairs, the sums of a head add up to its rows that have keys.
    """
    kept = flash.band(q.shape[0], q.shape[2], k.shape[2], begin, end, left, right, offset, q.device)
    kept = kept & (lse != -math.inf)[..., None]
    masked = flash.scores(q, k, scale, softcap) - torch.where(lse == -math.inf, 0, lse)[..., None]
    return torch.where(kept, torch.exp(masked), 0).sum(2)


def probe_scores(
    q: Tensor,
    k: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    left: int,
    right: int,
    offset: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Return (column sums `[B, Hq, K]` float32 of the probe rows, their LSE `[B, Hq, R]`).

    q `[B, Hq, R, D]` holds the probe rows only, usually the last ones, with offset = K - R; R is at most 128. The rest as in
    `eff::column_sums_v1`.
    """
    kept = flash.band(q.shape[0], q.shape[2], k.shape[2], begin, end, left, right, offset, q.device)
    lse = torch.logsumexp(flash.scores(q, k, scale, softcap).masked_fill(~kept, -math.inf), -1)
    return column_sums(q, k, lse, begin, end, left, right, offset, scale, softcap), lse


def _fake_sums(q: Tensor, k: Tensor, *rest: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], k.shape[2]), dtype=flash.lse_dtype(q))


def _fake_probe(q: Tensor, k: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return _fake_sums(q, k), q.new_empty(q.shape[:3], dtype=flash.lse_dtype(q))


BODIES = {COLUMN_SUMS: column_sums, PROBE: probe_scores}


def register() -> None:
    """Register both ops, once."""
    define(COLUMN_SUMS, COLUMN_SUMS_SCHEMA, column_sums, _fake_sums)
    define(PROBE, PROBE_SCHEMA, probe_scores, _fake_probe)
