"""Keep the blocks that hold most of the mass of a softmax over means (SpargeAttn's selector)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.density import extent
from effcompile.core.policy import check_share, check_whole, refused_value
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite
from effcompile.passes.attention.dynamic import products
from effcompile.passes.attention.prefill import PrefillPattern

ASSUMED = 0.5
"""Price the default settings at this density; the true one is data."""


@dataclass(frozen=True)
class PooledCdf(PrefillPattern):
    """Keep the fewest blocks that hold `cdf` of each row's mass, judged by mean queries and mean keys, in prefill.

    Blocks whose positions are less alike than `similarity` (their mean cosine; 0 turns this off) are computed whatever their
    means say. Blocks have `block` queries and half as many keys. The first block and the own ones stay beside the share.
    """

    cdf: float = 0.98
    similarity: float = 0.6
    block: int = 128

    name: ClassVar[str] = "pooled-cdf"
    paper: ClassVar[str] = "arXiv:2502.18137"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "cdf")
        value = self.similarity
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise refused_value(self, "similarity", "between 0 and 1")
        check_whole(self, "block", least=32, multiple=32)

    def blocks(self, site: AttentionSite) -> tuple[int, int]:
        """Return the block, and half of it for keys."""
        return self.block, self.block // 2

    def least(self, site: AttentionSite) -> int:
        """Return what the first block and the own ones hold."""
        return 2 * self.block

    def estimated(self, site: AttentionSite) -> float:
        """Return what is assumed, or everything."""
        return 1.0 if self.cdf >= 1 else ASSUMED

    def search(self, site: AttentionSite) -> float:
        """Return the FLOP of all pairs of means, and of their cosines."""
        height, width = self.blocks(site)
        pairs = products(site, extent(site.q_len) / height, extent(site.kv_len) / width, site.head_dim)
        vectors = extent(site.heads) * extent(site.q_len) + extent(site.kv_heads) * extent(site.kv_len)
        return pairs + 4.0 * extent(site.batch) * vectors * site.head_dim * (self.similarity > 0)

    def choose(self, call: AttentionCall, head: tuple[Any, ...], site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert `eff::pooled_blocks_v1`."""
        op = torch.ops.eff.pooled_blocks_v1.default
        return edit.call(op, *head, call.scale, float(self.cdf), float(self.similarity), *self.blocks(site))
