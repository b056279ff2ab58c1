"""Keep the blocks whose mean score is highest (Kinetics' block top-k)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.density import extent
from effcompile.core.policy import check_share, check_whole
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite
from effcompile.passes.attention.dynamic import products
from effcompile.passes.attention.prefill import PrefillPattern


@dataclass(frozen=True)
class BlockTopk(PrefillPattern):
    """Keep `density` of all pairs in prefill, in blocks of `block`; `budget` tokens in pages of `page` in decode.

    A block is judged by the product of the mean query and the mean key. The first block and those of the queries' own keys stay
    and count; a density below theirs gives theirs. The paper keeps prefill and the first layer dense.
    """

    density: float = 0.1
    block: int = 128
    budget: int = 1024
    page: int = 16
    dense_layers: int = 1

    name: ClassVar[str] = "block-topk"
    paper: ClassVar[str] = "arXiv:2506.05333"
    phase: ClassVar[str] = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "density")
        check_whole(self, "block", least=16, multiple=16)
        check_whole(self, "page", least=1)
        check_whole(self, "budget", least=self.page, multiple=self.page)

    def blocks(self, site: AttentionSite) -> tuple[int, int]:
        """Return the block twice, or one query and a page."""
        return (1, self.page) if site.q_len == 1 else (self.block, self.block)

    def least(self, site: AttentionSite) -> int:
        """Return the budget in decode; in prefill, two blocks: the first and the own."""
        return self.budget if site.q_len == 1 else 2 * self.block

    def estimated(self, site: AttentionSite) -> float:
        """Return the density; in decode, the budget over the number of keys."""
        return min(1.0, self.budget / extent(site.kv_len)) if site.q_len == 1 else self.density

    def search(self, site: AttentionSite) -> float:
        """Return the FLOP of all pairs of centroids."""
        height, width = self.blocks(site)
        return products(site, extent(site.q_len) / height, extent(site.kv_len) / width, site.head_dim)

    def choose(self, call: AttentionCall, head: tuple[Any, ...], site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert `eff::topk_blocks_v1` or `eff::pages_v1`."""
        if site.q_len == 1:
            return edit.call(torch.ops.eff.pages_v1.default, *head, self.budget, 2, self.page, "mean")
        return edit.call(torch.ops.eff.topk_blocks_v1.default, *head, float(self.density), self.block, self.block)
