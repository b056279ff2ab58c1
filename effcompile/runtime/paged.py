"""Hold the tokens of one layer in any form, and let a decode step read the pages of them that its queries are likely to want.

Nothing is dropped: which pages are read is chosen anew at every step, by a summary of the keys of each page as the model made them.
With Quest (arXiv:2406.10774) that is the least and the largest value of each channel, whose product with a query no key of the page
exceeds; with block top-k (arXiv:2506.05333) their mean. All query heads of a key head read the same pages. The kernels read nothing
of a piece of 64 tokens that a mask hides from every query, so pages are multiples of that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effcompile.core.cache import CacheFormat, CacheShape
from effcompile.core.site import CacheSite
from effcompile.ops.kv import common
from effcompile.runtime.kv_cache import LayerCache

PAGE = 64
LOCAL = 2  # the last pages, which are always read, as the first one is


@dataclass(frozen=True)
class Reading:
    """Say how many tokens a step reads, in pages of how many, and whether a page is judged by a bound of its keys or by their mean.

    The first `dense` layers read all.
    """

    budget: int
    page: int
    bound: bool
    spelled: str
    dense: int = 0


class PagedCache(LayerCache):
    """Hold keys and values of one layer, of which a step reads `reading.budget` tokens.

    Raises:
        EffError: what the format refuses about the site.
    """

    def __init__(self, format: CacheFormat, site: CacheSite, reading: Reading) -> None:
        super().__init__(format, site)
        self.reading = reading
        self.spelled = f"{format.spelled} attention={reading.spelled}"

    def _layout(self, shape: CacheShape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        lead = (shape.batch, shape.kv_heads, -(-shape.capacity // self.reading.page), shape.head_dim)
        names = ("page_least", "page_most") if self.reading.bound else ("page_sum",)
        kind = shape.dtype if self.reading.bound else torch.float32
        return super()._layout(shape) | dict.fromkeys(names, (lead, kind))

    def _tensors(self, shape: CacheShape) -> dict[str, Tensor]:
        made = super()._tensors(shape)
        _empty(made)
        return made

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens, and take them into the summaries of their pages."""
        if self.shape is None:
            self.prepare(k, v)
        self.reserve(k.shape[2])
        before = self.state["length"].clone()
        super().append(k, v)
        state, count = self.state, k.shape[2]
        pages = (before + torch.arange(count, device=k.device)) // self.reading.page
        if count == 1:
            for name, join in (("page_least", torch.minimum), ("page_most", torch.maximum), ("page_sum", torch.add)):
                if name in state:
                    held = state[name].index_select(2, pages)
                    state[name].index_copy_(2, pages, join(held, k.to(held.dtype)))
            return
        places = pages[:, None].expand_as(k)
        for name, how in (("page_least", "amin"), ("page_most", "amax"), ("page_sum", "sum")):
            if name in state:
                state[name].scatter_reduce_(2, places, k.to(state[name].dtype), how)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Return (output, LSE) of attention over all held tokens in a call of many queries, else over those of the chosen pages."""
        assert self.shape is not None
        asked = -(-self.reading.budget // self.reading.page)
        if q.shape[2] > common.FEW or asked >= -(-self.shape.capacity // self.reading.page):
            return super().attend(q, k, v, mask, causal, scale, softcap)
        columns = self.shape.capacity if mask is None else mask.shape[3]
        chosen = self.chosen(q, mask, asked).repeat_interleave(self.reading.page, 2)
        if columns > chosen.shape[2]:  # of a mask that is longer than the cache
            chosen = torch.nn.functional.pad(chosen, (0, columns - chosen.shape[2]))
        chosen = chosen[..., :columns].repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]
        if mask is None:
            mask = chosen.expand(-1, -1, q.shape[2], -1)
        else:
            mask = mask & chosen if mask.dtype == torch.bool else torch.where(chosen, mask, -torch.inf)
        return super().attend(q, k, v, mask, causal, scale, softcap)

    def chosen(self, q: Tensor, mask: Tensor | None, count: int) -> Tensor:
        """Return which pages q `[B, Hq, Q, D]` reads, bool `[B, Hkv, P]`: `count` of them, and those that hold new tokens."""
        state, page, fresh = self.state, self.reading.page, q.shape[2]
        length = state["length"]
        first = next(state[name] for name in ("page_least", "page_sum") if name in state)
        heads, pages = first.shape[1], torch.arange(first.shape[2], device=q.device)
        held = pages * page < length
        queries = q.unflatten(1, (heads, -1)).flatten(2, 3).float()  # [B, Hkv, g * Q, D]
        if self.reading.bound:
            least, most = (
                torch.where(held[:, None], state[name], 0).float().transpose(2, 3)
                for name in ("page_least", "page_most")
            )
            scores = (queries.clamp(min=0) @ most + queries.clamp(max=0) @ least).amax(2)
        else:
            tokens = (length - pages * page).clamp(1, page)
            mean = state["page_sum"] / tokens[:, None]
            scores = (queries.mean(2, keepdim=True) @ mean.transpose(2, 3))[:, :, 0]
        seen = held.expand(scores.shape)
        if mask is not None:
            open_ = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            short = first.shape[2] * page - mask.shape[3]
            open_ = torch.nn.functional.pad(open_, (0, short)) if short > 0 else open_[..., : first.shape[2] * page]
            seen = seen & open_.any(2).unflatten(2, (-1, page)).any(3).any(1, keepdim=True)
        start = seen.long().argmax(2, keepdim=True)  # padding is no first page
        last = (length - 1) // page
        stays = (pages == start) | ((pages > last - LOCAL) & held) | (pages >= (length - fresh) // page)
        scores = torch.where(seen, torch.where(stays, torch.inf, scores), -torch.inf)
        best = scores.topk(min(count, scores.shape[2]), 2).indices
        found = torch.zeros(seen.shape, dtype=torch.bool, device=q.device)
        return found.scatter(2, best, torch.ones_like(best, dtype=torch.bool)) & seen

    # --- the past ----------------------------------------------------------------------------------------------------------------

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on; the summary of the page that is cut stays a bound, and pages behind it are empty."""
        cut = length < self.length
        super().crop(length)
        if not cut:
            return
        page = self.reading.page
        whole, first = -(-length // page), length // page
        for name, blank in (("page_least", torch.inf), ("page_most", -torch.inf), ("page_sum", 0.0)):
            if name in self.state:
                self.state[name][:, :, whole:] = blank
        if first < whole and "page_sum" in self.state:
            keys, _ = self.read(first * page, length)
            self.state["page_sum"][:, :, first] = keys.float().sum(2)

    def reset(self) -> None:
        """Forget all tokens; the tensors stay."""
        super().reset()
        if self.state:
            _empty(self.state)


def _empty(state: dict[str, Tensor]) -> None:
    for name, blank in (("page_least", torch.inf), ("page_most", -torch.inf), ("page_sum", 0.0)):
        if name in state:
            state[name].fill_(blank)
