"""Define `eff::int8_attention_v1`: attention with query-key products of 8-bit integers (SageAttention, arXiv 2410.02367).

Keys lose their mean over the tokens first, which no softmax sees; queries and keys are then rounded to int8 with one scale for each
block of rows, and the products are exact 32-bit integers. Probabilities and values stay in the floating-point type of v.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.ops import flash
from effcompile.ops.attention import define

NAME = "eff::int8_attention_v1"
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? begin, Tensor? end, SymInt left, SymInt right, SymInt offset, float scale) "
    "-> (Tensor, Tensor)"
)
Q_BLOCK = 128
K_BLOCK = 64


def int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    left: int,
    right: int,
    offset: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return (output `[B, Hq, Q, Dv]`, LSE `[B, Hq, Q]`) with int8 products; arguments as in `eff::flash_v1`.

    The LSE is that of the unsmoothed scores. A block of queries is 128 rows, of keys 64.
    """
    kept = flash.band(q.shape[0], q.shape[2], k.shape[2], begin, end, left, right, offset, q.device)
    mean = key_mean(k, begin, end)
    inside = flash.band(k.shape[0], 1, k.shape[2], begin, end, -1, -1, 0, k.device)[:, :, 0, :, None]
    # What lies outside the range may be anything, and must not widen the scale of its block.
    keys, key_scale = quantized(torch.where(inside, flash.wide(k) - mean, 0), K_BLOCK)
    queries, query_scale = quantized(q, Q_BLOCK)
    scores = flash.scores(queries * query_scale, keys * key_scale, scale)
    out, lse = flash.weighted(scores.masked_fill(~kept, -math.inf), v)
    return out.to(v.dtype), lse + flash.scores(q, mean.to(flash.wide(q).dtype), scale)[..., 0]


def key_mean(k: Tensor, begin: Tensor | None, end: Tensor | None) -> Tensor:
    """Return the mean over the keys of the range `[B, Hkv, 1, D]`; 0 where there is none."""
    inside = flash.band(k.shape[0], 1, k.shape[2], begin, end, -1, -1, 0, k.device)[:, :, 0, :, None]
    return torch.where(inside, flash.wide(k), 0).sum(2, keepdim=True) / inside.sum(2, keepdim=True).clamp(min=1)


def quantized(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return (integers of -127 ... 127, scales `[B, H, S, 1]`), one scale for each block of rows; a block of zeros has scale 1."""
    wide = flash.wide(x)
    most = F.pad(wide.abs().amax(-1), (0, -x.shape[2] % block)).unflatten(2, (-1, block)).amax(3)
    scale = torch.where(most > 0, most / 127, torch.ones_like(most))
    rows = scale.repeat_interleave(block, 2)[:, :, : x.shape[2], None]
    return torch.round(wide / rows).clamp(-127, 127), rows


BODIES = {NAME: int8_attention}


def register() -> None:
    """Register the op, once."""
    define(NAME, SCHEMA, int8_attention, flash.fake_pair)
