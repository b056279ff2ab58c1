"""Keep the columns and the diagonals that the last queries read (MInference, with FlexPrefill's coverage)."""

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
from effcompile.passes.attention.prefill import PrefillPattern

ASSUMED = 0.3
"""Price the default coverage at this density; the true one is data."""


@dataclass(frozen=True)
class VerticalSlash(PrefillPattern):
    """Keep the fewest columns and the fewest diagonals that hold `coverage` of what `probe` last queries read, in prefill.

    Columns are `column` keys wide, diagonals `block` queries. The last queries stand for all: the choice sees the whole prompt.
    """

    coverage: float = 0.9
    probe: int = 64
    block: int = 128
    column: int = 32

    name: ClassVar[str] = "vertical-slash"
    paper: ClassVar[str] = "arXiv:2407.02490"
    ordered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "coverage")
        check_whole(self, "probe", least=1)
        check_whole(self, "column", least=16, multiple=16)
        check_whole(self, "block", least=16, multiple=16)

    def blocks(self, site: AttentionSite) -> tuple[int, int]:
        """Return a diagonal's width and a column's."""
        return self.block, self.column

    def least(self, site: AttentionSite) -> int:
        """Return two blocks: the first column's and the own diagonal's."""
        return 2 * self.block

    def estimated(self, site: AttentionSite) -> float:
        """Return what is assumed at the default coverage, more above it."""
        return 1.0 if self.coverage >= 1 else min(1.0, ASSUMED * self.coverage / 0.9)

    def search(self, site: AttentionSite) -> float:
        """Return the FLOP of the probe rows' scores."""
        rows = min(self.probe, extent(site.q_len))
        return 2.0 * extent(site.batch) * extent(site.heads) * rows * extent(site.kv_len) * site.head_dim

    def choose(self, call: AttentionCall, head: tuple[Any, ...], site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert `eff::vertical_slash_blocks_v1`."""
        op = torch.ops.eff.vertical_slash_blocks_v1.default
        return edit.call(op, *head, call.scale, float(self.coverage), self.probe, *self.blocks(site))
