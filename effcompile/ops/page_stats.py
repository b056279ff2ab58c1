"""Summarize pages of keys: their mean (Kinetics, arXiv:2506.05333) and their least and largest values (Quest, arXiv:2406.10774).

A score of a query against a summary stands for its scores against the keys of the page. With the mean it is their mean exactly;
with the bounds it is at least each of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class PageStats:
    """Hold summaries `[B, Hkv, P, D]` of `length` keys in pages of `page`; the last page may be part full."""

    page: int
    length: int
    sums: torch.Tensor
    least: torch.Tensor
    most: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """Return the mean key of each page."""
        count = torch.full((self.sums.shape[2],), float(self.page), dtype=self.sums.dtype, device=self.sums.device)
        count[-1:] = self.length - (self.sums.shape[2] - 1) * self.page
        return self.sums / count[:, None]

    def append(self, keys: torch.Tensor) -> PageStats:
        """Return the summaries after more keys `[B, Hkv, N, D]`; only the last page and new ones are computed."""
        done = self.length // self.page
        part = self.length - done * self.page
        head = keys[:, :, : (self.page - part) % self.page if part else 0]
        stats = self
        if head.shape[2]:
            last = slice(done, done + 1)
            wide = head.to(self.sums.dtype)
            stats = replace(
                self,
                length=self.length + head.shape[2],
                sums=torch.cat([self.sums[:, :, :done], self.sums[:, :, last] + wide.sum(2, keepdim=True)], 2),
                least=torch.cat(
                    [self.least[:, :, :done], self.least[:, :, last].minimum(head.amin(2, keepdim=True))], 2
                ),
                most=torch.cat([self.most[:, :, :done], self.most[:, :, last].maximum(head.amax(2, keepdim=True))], 2),
            )
        rest = keys[:, :, head.shape[2] :]
        if not rest.shape[2]:
            return stats
        new = page_stats(rest, self.page)
        joined = {name: torch.cat([getattr(stats, name), getattr(new, name)], 2) for name in ("sums", "least", "most")}
        return replace(stats, length=stats.length + rest.shape[2], **joined)

    def truncate(self, length: int, keys: torch.Tensor) -> PageStats:
        """Return the summaries of the first `length` of `keys` `[B, Hkv, N, D]`; the page that is cut is computed anew."""
        done = length // self.page
        kept = {name: getattr(self, name)[:, :, :done] for name in ("sums", "least", "most")}
        short = replace(self, length=done * self.page, **kept)
        return short.append(keys[:, :, done * self.page : length])


def page_stats(keys: torch.Tensor, page: int, real: torch.Tensor | None = None) -> PageStats:
    """Summarize keys `[B, Hkv, N, D]`; sums are float32 (float64 for float64), bounds have the dtype of the keys.

    Where only some keys are `real` `[B|1, N]`, bounds are over those, and 0 where a page has none; sums take the others for 0.
    """
    length = keys.shape[2]
    if real is not None:
        mask = real.bool()[:, None, :, None]
        low, high = (page_stats(keys.masked_fill(~mask, x), page) for x in (math.inf, -math.inf))
        least, most = (x.masked_fill(x.isinf(), 0) for x in (low.least, high.most))
        return PageStats(page, length, page_stats(keys.masked_fill(~mask, 0), page).sums, least, most)
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    full = length // page * page
    pages = keys[:, :, :full].unflatten(2, (-1, page))
    parts = [(pages.sum(3, dtype=wide), pages.amin(3), pages.amax(3))] if full else []
    if full < length:
        tail = keys[:, :, None, full:]
        parts.append((tail.sum(3, dtype=wide), tail.amin(3), tail.amax(3)))
    if not parts:
        empty = keys[:, :, :0]
        parts.append((empty.to(wide), empty, empty))
    sums, least, most = (torch.cat(items, 2) for items in zip(*parts))
    return PageStats(page, length, sums, least, most)


def page_bounds(q: torch.Tensor, stats: PageStats) -> torch.Tensor:
    """Return an upper bound of q . k over the keys of each page: q `[B, Hq, Q, D]` gives `[B, Hq, Q, P]` (Quest's score)."""
    group = q.shape[1] // stats.least.shape[1]
    high, low = q.clamp(min=0), q.clamp(max=0)

    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        batch, heads, rows, width = x.shape
        packed = x.reshape(batch, heads // group, group * rows, width)
        return torch.matmul(packed, y.to(x.dtype).transpose(-1, -2)).reshape(batch, heads, rows, -1)

    return product(high, stats.most) + product(low, stats.least)
