"""Attend between clusters of tokens that are alike (Sparse VideoGen 2)."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.density import extent
from effcompile.core.policy import check_share, check_whole, refused_value
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite
from effcompile.passes.attention.video import OrderedPattern

ASSUMED = 0.3
"""Price the default mass at this density; the true one is data."""


@dataclass(frozen=True)
class Svg2(OrderedPattern):
    """Bring queries and keys together in clusters, and keep the pairs of clusters that hold `mass` of what their means attend to.

    k-means makes `queries` clusters of queries and `keys` of keys in each head, with `rounds` updates from tokens spread
    over all. A cluster of keys counts as often as it has tokens, and at least a share of `floor` of them is read. Blocks of
    `block` ordered tokens that a pair touches are computed whole: more is read than was chosen, never less. A graph sees one step,
    so k-means begins anew where the paper goes on from the step before. `text` tokens at the front read and are read by all.
    """

    mass: float = 0.9
    queries: int = 300
    keys: int = 1000
    floor: float = 0.1
    rounds: int = 4
    text: int = 0

    name: ClassVar[str] = "svg2"
    paper: ClassVar[str] = "arXiv:2505.18875"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "mass")
        if not 0 <= self.floor <= 1:
            raise refused_value(self, "floor", "from 0 to 1")
        check_whole(self, "queries", least=1)
        check_whole(self, "keys", least=1)
        check_whole(self, "rounds")
        check_whole(self, "text")

    def least(self, site: AttentionSite) -> int:
        """Return the tokens up to which clusters have too few of them to stand for anything."""
        return self.text + 2 * max(self.queries, self.keys)

    def expected(self, site: AttentionSite) -> float:
        """Return what is assumed at the default mass, more above it."""
        return 1.0 if self.mass >= 1 else min(1.0, ASSUMED * self.mass / 0.9)

    def search(self, site: AttentionSite) -> float:
        """Return the FLOP of the distances to means."""
        tokens = extent(site.batch) * extent(site.heads) * extent(site.kv_len)
        return 2.0 * (self.rounds + 1) * tokens * (self.queries + self.keys) * site.head_dim

    def orders(self, call: AttentionCall, edit: Editor) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Insert `eff::cluster_blocks_v1`."""
        settings = (float(self.mass), float(self.floor), self.queries, self.keys, self.rounds, self.text, self.block)
        made = edit.call(torch.ops.eff.cluster_blocks_v1.default, call.q, call.k, call.scale, *settings)
        q_order, k_order, chosen = (edit.call(operator.getitem, made, place) for place in range(3))
        return q_order, k_order, chosen
