"""Gather rows into a fixed capacity and scatter them back, where each sequence keeps a number of its own.

Capacity is a multiple of a block, so that shapes take few values. A place that is not used names a row that is masked; each row of
the result is written once, which keeps the scatter deterministic.
"""

from __future__ import annotations

import torch


def gather_plan(kept: torch.Tensor, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (index `[B, P]` int64, used `[B, P]` bool) of kept rows `[B, N]` in their order.

    P is the largest number that a sequence keeps, rounded up to a multiple, at most N. Unused places hold the last row.
    """
    count = kept.sum(-1)
    most = int(count.max()) if kept.numel() else 0
    capacity = min(kept.shape[-1], -(-most // multiple) * multiple)
    order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :capacity]
    used = torch.arange(capacity, device=kept.device) < count[:, None]
    return torch.where(used, order, kept.shape[-1] - 1), used


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return rows `[B, H, P, D]` of x `[B, H, N, D]` at index `[B, P]`."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def scatter_rows(rows: torch.Tensor, index: torch.Tensor, used: torch.Tensor, length: int) -> torch.Tensor:
    """Return `[B, H, length, D]` with rows `[B, H, P, D]` at their places where `used`, and 0 elsewhere."""
    out = rows.new_zeros((rows.shape[0], rows.shape[1], length + 1, rows.shape[3]))
    place = torch.where(used, index, length)  # what is not used lands behind the end
    out.scatter_(2, place[:, None, :, None].expand_as(rows), rows)
    return out[:, :, :length]
