"""Keep the blocks that hold most of the mass that antidiagonals see (XAttention)."""

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

ASSUMED = 0.3
"""Price the default threshold at this density; the true one is data."""


@dataclass(frozen=True)
class XAttention(PrefillPattern):
    """Keep the fewest blocks of `block` that hold `threshold` of each row's estimated mass, in prefill.

    The estimate is one product at 1 / `stride` of the cost of all scores. The first block and those of the queries' own keys stay
    beside it: a threshold is a share of the mass before them, so that no later key decides.
    """

    threshold: float = 0.9
    stride: int = 16
    block: int = 128

    name: ClassVar[str] = "xattention"
    paper: ClassVar[str] = "arXiv:2503.16428"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "threshold")
        check_whole(self, "stride", least=1)
        check_whole(self, "block", least=16, multiple=16)
        check_whole(self, "block", least=self.stride, multiple=self.stride)

    def blocks(self, site: AttentionSite) -> tuple[int, int]:
        """Return the block twice."""
        return self.block, self.block

    def least(self, site: AttentionSite) -> int:
        """Return two blocks: the first and the own."""
        return 2 * self.block

    def estimated(self, site: AttentionSite) -> float:
        """Return what is assumed at the default threshold, more above it."""
        return 1.0 if self.threshold >= 1 else min(1.0, ASSUMED * self.threshold / 0.9)

    def search(self, site: AttentionSite) -> float:
        """Return the FLOP of the scores of groups, whose vectors are `stride` times as wide."""
        queries, keys = extent(site.q_len) / self.stride, extent(site.kv_len) / self.stride
        return products(site, queries, keys, self.stride * site.head_dim)

    def choose(self, call: AttentionCall, head: tuple[Any, ...], site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert `eff::antidiagonal_blocks_v1`."""
        op = torch.ops.eff.antidiagonal_blocks_v1.default
        return edit.call(op, *head, call.scale, float(self.threshold), self.stride, self.block, self.block)
