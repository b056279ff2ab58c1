"""Keep what the last queries of a prompt read (SnapKV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from effcompile.core.eviction import CacheEviction, Context
from effcompile.core.policy import Exactness, check_whole, refused_value
from effcompile.ops.kv import scores


@dataclass(frozen=True)
class SnapKV(CacheEviction):
    """Keep the last `window` tokens of a prompt and those before them that their queries read most, `budget` in all.

    The attention of the window's queries to a token is summed over the query heads of a key head and averaged over `pool`
    neighbors, so that what stands beside a token that is read stays with it. A question has to stand in the window: another one,
    asked later, finds what this one needed. Tokens that are generated all stay until the next prompt.
    """

    budget: int = 1024
    window: int = 32
    pool: int = 5

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "arXiv:2404.14469"
    exactness: ClassVar[Exactness] = "lossy"

    def __post_init__(self) -> None:
        check_whole(self, "window", least=1)
        check_whole(self, "budget", least=1)
        check_whole(self, "pool", least=1)
        if self.budget <= self.window:
            raise refused_value(self, "budget", f"more than window={self.window}")
        if self.pool % 2 == 0:
            raise refused_value(self, "pool", "odd, so that it has a middle")

    def stays(self, total: int) -> int:
        """Return the budget."""
        return self.budget

    def waits(self) -> int:
        """Return one token more than the window: what is as short has no token before it that could go."""
        return self.window + 1

    def rank(self, context: Context) -> Tensor:
        """Rank by the mean attention of the window around a token."""
        heads, total = context.k.shape[1], context.k.shape[2]
        first = context.fresh - self.window
        mask = None if context.mask is None else context.mask[:, :, first:]
        asked = scores.masked_scores(
            context.q[:, :, first:],
            context.k,
            mask,
            context.causal,
            total - self.window,
            context.scale,
            context.softcap,
        )
        read = scores.by_key_head(scores.weights(asked).sum(2), heads)
        # The window's own tokens stay in any case, and are no neighbors of those that are ranked.
        before = functional.avg_pool1d(read[..., : -self.window], self.pool, stride=1, padding=self.pool // 2)
        return functional.pad(before, (0, self.window), value=torch.inf)
