"""Hold what patterns that choose blocks for a prompt have in common: its last queries can stay exact."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.density import extent, pairs
from effcompile.core.expr import QUERY, apply, axis, const
from effcompile.core.mask import Mask
from effcompile.core.policy import check_whole
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite
from effcompile.passes.attention.dynamic import DynamicPattern


@dataclass(frozen=True)
class PrefillPattern(DynamicPattern):
    """Choose blocks of keys for blocks of queries; the last `tail` queries of a prompt read every key that the mask allows.

    A prompt asks at its end. Estimates from means or from samples of a block can miss the one block far back that the question is
    about, and exact last rows cost little: at 8,192 tokens one block of 128 queries is 3 % of the pairs. Papers have no such rows,
    so none is the default. A batch that is padded on the right ends in padding: the tail has to cover it.
    """

    tail: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "tail")

    @abstractmethod
    def estimated(self, site: AttentionSite) -> float:
        """Return the density without the tail."""

    def expected(self, site: AttentionSite) -> float:
        """Return the estimated density, with the tail's share of the pairs at density 1."""
        density = self.estimated(site)
        if not self._ends(site):
            return density
        assert isinstance(site.mask, Mask)
        rows, columns = extent(site.q_len), extent(site.kv_len)
        height = self.blocks(site)[0]
        late = apply("ge", axis(QUERY), const(max(0, rows - self.tail) // height * height))
        whole = pairs(site.mask.keep, rows, columns)
        share = pairs(apply("and", site.mask.keep, late), rows, columns) / whole if whole else 1.0
        return density + (1 - density) * share

    def map(self, call: AttentionCall, head: tuple[Any, ...], site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the selector, and `eff::tail_blocks_v1` over its map where a tail is asked for."""
        chosen = super().map(call, head, site, edit)
        if not self._ends(site):
            return chosen
        return edit.call(torch.ops.eff.tail_blocks_v1.default, *head, chosen, self.tail, *self.blocks(site))

    def _ends(self, site: AttentionSite) -> bool:
        # The one query of a decode step is no end of a prompt.
        return self.tail > 0 and site.q_len != 1
