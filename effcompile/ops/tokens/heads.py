"""Count what heads give, and multiply by the part of a weight that belongs to some of them; which ones may differ by sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def head_mass(result: Tensor, group: int, real: Tensor | None) -> Tensor:
    """Return `[B, Hkv]`: the sum of absolute values of an attention's result `[B, Hkv * group, N, D]`, padding apart.

    Float32, float64 for float64; `real` `[B, N]` bool says which tokens are no padding.
    """
    batch, heads, tokens, _ = result.shape
    sums = result.to(torch.promote_types(result.dtype, torch.float32)).abs().sum(-1)
    if real is not None:
        sums = sums.masked_fill(~real[:, None, :], 0.0)
    return sums.reshape(batch, heads // group, group * tokens).sum(-1)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, before: int, heads: int) -> Tensor:
    """Return `[B, N, before * K * after]`: a linear layer's rows of some heads, for x `[B, N, C]` and heads `index` `[B, K]`.

    The rows of weight `[before * heads * after, C]` and the elements of bias are `before` x heads x `after`.
    """
    batch, width = index.shape[0], weight.shape[1]
    rows = _taken(weight.reshape(before, heads, -1, width), index).reshape(batch, -1, width)
    product = torch.bmm(x, rows.transpose(1, 2))
    if bias is None:
        return product
    return product + _taken(bias.reshape(before, heads, -1), index).reshape(batch, 1, -1)


def join(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, before: int, heads: int) -> Tensor:
    """Return `[B, N, C]`: a linear layer of some heads of x `[B, N, before * K * after]`, weight `[C, before * heads * after]`."""
    batch, width = index.shape[0], weight.shape[0]
    columns = _taken(weight.t().reshape(before, heads, -1, width), index).reshape(batch, -1, width)
    product = torch.bmm(x, columns)
    return product if bias is None else product + bias


def _taken(parts: Tensor, index: Tensor) -> Tensor:
    """Return `[B, before, K, ...]` of parts `[before, heads, ...]`."""
    batch, count = index.shape
    found = parts.index_select(1, index.reshape(-1))
    return found.reshape(parts.shape[0], batch, count, *parts.shape[2:]).transpose(0, 1)
