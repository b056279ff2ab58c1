"""Keep the pages of keys that may hold the highest scores of a query (Quest)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.density import extent
from effcompile.core.policy import check_whole
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite
from effcompile.passes.attention.dynamic import DynamicPattern, products


@dataclass(frozen=True)
class Quest(DynamicPattern):
    """Keep `budget` tokens in pages of `page` for each query head, in decode.

    A page is judged by a bound of its scores, from the least and the largest value of its keys in each component. The first page
    and the last two stay. The paper keeps the first two layers dense.
    """

    budget: int = 2048
    page: int = 16
    dense_layers: int = 2

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "arXiv:2406.10774"
    phase: ClassVar[str] = "decode"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "page", least=1)
        check_whole(self, "budget", least=self.page, multiple=self.page)

    def blocks(self, site: AttentionSite) -> tuple[int, int]:
        """Return one query and a page."""
        return 1, self.page

    def least(self, site: AttentionSite) -> int:
        """Return the budget."""
        return self.budget

    def expected(self, site: AttentionSite) -> float:
        """Return the budget over the number of keys."""
        return min(1.0, self.budget / extent(site.kv_len))

    def search(self, site: AttentionSite) -> float:
        """Return the FLOP of two products with every page."""
        return 2 * products(site, 1, extent(site.kv_len) / self.page, site.head_dim)

    def choose(self, call: AttentionCall, head: tuple[Any, ...], site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert `eff::pages_v1`."""
        return edit.call(torch.ops.eff.pages_v1.default, *head, self.budget, 2, self.page, "bound")
