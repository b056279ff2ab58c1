"""Serve sink logits (gpt-oss) from the LSE of plain attention.

A sink is one more score in a row's softmax, whose column is dropped again. With O and LSE of the attention without it, the row is
O * exp(LSE) / (exp(LSE) + exp(sink)) = O * sigmoid(LSE - sink): one number a row, whatever the number of keys.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def flash_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (output `[B, Hq, Q, Dv]`, LSE `[B, Hq, Q]`) from torch's flash attention for CPU.

    Shapes as in SDPA; mask is bool (True keeps) or added to the scores. A row without keys gives 0 and an LSE that means nothing.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    width, wanted = max(q.shape[3], v.shape[3]), v.shape[3]
    # The kernel takes one head dimension for all, and reads rows as if their elements lay side by side.
    q, k, v = (_dense(F.pad(x, (0, width - x.shape[3])) if x.shape[3] != width else x) for x in (q, k, v))
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out, lse = op(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return out[..., :wanted], lse


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def gate(lse: Tensor, sinks: Tensor) -> Tensor:
    """Return what a sink leaves of a row, `[B, Hq, Q, 1]`: lse `[B, Hq, Q]`, sinks `[Hq]`."""
    return torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None]


def empty_gate(sinks: Tensor, rule: str, like: Tensor) -> Tensor:
    """Return what a sink leaves of a row without keys, `[1, Hq, 1, 1]`.

    Its scores are all the fill: -inf, or the least float32 where the rule is "uniform". So that is its LSE.
    """
    fill = torch.finfo(torch.float32).min if rule == "uniform" else -math.inf
    wide = torch.promote_types(like.dtype, torch.float32)
    return gate(torch.full((1, sinks.shape[0], 1), fill, dtype=wide, device=like.device), sinks)
