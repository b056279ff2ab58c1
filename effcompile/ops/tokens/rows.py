"""Take, merge and put back the rows of a sequence; `index` `[B, L]` int64 holds places that rise within a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

Spans = tuple[tuple[int, int], ...]


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return rows `[B, L, ...]` of x `[B, N, ...]`."""
    return take_along(x, index, 0, 1)


def take_along(x: Tensor, index: Tensor, batch: int, token: int) -> Tensor:
    """Return x with the tokens at `index` along dimension `token`; its dimension `batch` has one element, or one a sequence."""
    where = index if batch < token else index.transpose(0, 1)
    shape = [1] * x.dim()
    shape[batch], shape[token] = index.shape
    wide, many = list(x.shape), list(x.shape)
    wide[batch] = many[batch] = index.shape[0]
    many[token] = index.shape[1]
    return x.expand(wide).gather(token, where.reshape(shape).expand(many))


def take_and_sum(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return rows `[B, L + 1, C]` of x `[B, N, C]`: those at `index`, and behind them the sum of all, weighted by `[B, N]`."""
    total = weights.to(x.dtype)[:, None] @ x
    return torch.cat([take(x, index), total], 1)


def put_back(before: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """Return `before` `[B, N, C]` with the first L rows of x in the places `index` `[B, L]`."""
    return before.scatter(1, index[:, :, None].expand(-1, -1, x.shape[2]), x[:, : index.shape[1]])


def merge_sizes(sizes: Tensor, index: Tensor, source: Tensor, into: Tensor, matrix: bool = False) -> Tensor:
    """Return how many tokens each of `[B, L]` stands for after a merge, from those before it `[B, N]`."""
    gone = sizes.gather(1, source)
    return sizes.gather(1, index) + _summed(gone[:, :, None], into, index.shape[1], matrix)[:, :, 0]


def merge(
    x: Tensor, sizes: Tensor, merged: Tensor, index: Tensor, source: Tensor, into: Tensor, matrix: bool = False
) -> Tensor:
    """Return the mean `[B, L, C]` of merged rows of x `[B, N, C]`, weighted by the tokens that each stands for.

    A row that nothing is merged into stays as it is, bit by bit.
    """
    wide = x.to(torch.promote_types(x.dtype, merged.dtype))
    stay, gone = take(wide, index), take(wide, source)
    kept = sizes.gather(1, index)
    added = _summed(gone * sizes.gather(1, source)[:, :, None], into, index.shape[1], matrix)
    mean = (stay * kept[:, :, None] + added) / merged[:, :, None]
    return torch.where((merged == kept)[:, :, None], stay, mean).to(x.dtype)


def _summed(values: Tensor, into: Tensor, count: int, matrix: bool) -> Tensor:
    """Return `[B, count, C]`: rows of values `[B, r, C]` added up at the places `into` `[B, r]`.

    By a product with a `matrix` of zeros and ones where a runtime adds up no scattered values (TensorRT-RTX).
    """
    if matrix:
        places = torch.arange(count, device=into.device)[None, :, None]
        return torch.bmm((places == into[:, None, :]).to(values.dtype), values)
    none = values.new_zeros((values.shape[0], count, values.shape[2]))
    return none.scatter_add(1, into[:, :, None].expand(-1, -1, values.shape[2]), values)


def homes(index: Tensor, source: Tensor, into: Tensor, count: int) -> Tensor:
    """Return for each of `count` tokens before a merge the place of the token that it is part of afterwards, `[B, count]`."""
    places = torch.arange(index.shape[1], device=index.device).expand(index.shape[0], -1)
    return places.new_zeros((index.shape[0], count)).scatter(1, index, places).scatter(1, source, into)


def held(positions: Tensor, pinned: Spans, count: int) -> Tensor:
    """Return which tokens at `positions` `[B, N]` of `count` are in a pinned span (first place, how many)."""
    found = torch.zeros_like(positions, dtype=torch.bool)
    for begin, many in pinned:
        at = positions - begin % count
        found = found | ((at >= 0) & (at < many))
    return found


def held_real(positions: Tensor, real: Tensor, pinned: Spans) -> Tensor:
    """Return the same where places count from the first real token, negative ones from behind the last one; real `[B, N]`."""
    places = torch.arange(real.shape[1], device=real.device)
    first = torch.where(real, places, real.shape[1]).amin(-1, keepdim=True)
    last = torch.where(real, places, -1).amax(-1, keepdim=True)
    found = torch.zeros_like(positions, dtype=torch.bool)
    for begin, many in pinned:
        at = positions - (first + begin if begin >= 0 else last + 1 + begin)
        found = found | ((at >= 0) & (at < many) & (positions >= first) & (positions <= last))
    return found
