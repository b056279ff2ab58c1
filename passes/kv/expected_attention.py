"""Keep what queries to come are expected to read (Expected Attention)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effcompile.core.eviction import ALL, CacheEviction, Context
from effcompile.core.policy import Exactness, check_share, check_whole
from effcompile.ops.kv import scores


@dataclass(frozen=True)
class ExpectedAttention(CacheEviction):
    """Keep the share `keep` of a prompt, at least `least` tokens: those that the next `future` queries are expected to read.

    Queries before their rotation are taken for normally distributed, with mean and covariance of the prompt's; turned by the
    mean of the next rotations they give the expected weight of a key, which is multiplied by the length of its value. It needs
    no question in the prompt. The first `sinks` tokens always stay. Tokens that are generated all stay until the next prompt.
    """

    keep: float = 0.5
    least: int = 128
    sinks: int = 4
    future: int = 512

    name: ClassVar[str] = "expected-attention"
    paper: ClassVar[str] = "arXiv:2510.00636"
    exactness: ClassVar[Exactness] = "lossy"
    turns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share(self, "keep")
        check_whole(self, "sinks", least=0)
        check_whole(self, "future", least=1)
        check_whole(self, "least", least=self.sinks + 1)

    def stays(self, total: int) -> int:
        """Return the share, at least `least`."""
        return ALL if self.keep == 1 else max(self.least, int(self.keep * total))

    def first(self) -> int:
        """Return the sinks."""
        return self.sinks

    def rank(self, context: Context) -> Tensor:
        """Rank by the expected weight times the length of the value."""
        heads = context.k.shape[1]
        mean, spread = self._queries(context)
        keys = scores.by_query_head(context.k.float(), context.q.shape[1])
        scale = context.scale
        expected = torch.einsum("bhnd,bhd->bhn", keys, mean) * scale
        expected = expected + (keys @ spread * keys).sum(-1) * (scale * scale / 2)
        sink = context.positions - context.start[:, None, None] < self.sinks
        counts = scores.by_query_head(context.real & ~sink, context.q.shape[1])
        # As logarithms: what is a millionth of the largest is still ranked.
        shares = torch.log_softmax(expected.masked_fill(~counts, -torch.inf), -1).nan_to_num(nan=-torch.inf)
        weight = shares.unflatten(1, (heads, -1)).logsumexp(2) + context.v.float().norm(dim=-1).log()
        return torch.where(sink, torch.inf, weight)

    def _queries(self, context: Context) -> tuple[Tensor, Tensor]:
        """Return mean `[B, Hq, D]` and covariance `[B, Hq, D, D]` of the queries that are expected."""
        fresh, total, q = context.fresh, context.total, context.q.float()
        places = torch.arange(total - fresh, total, device=q.device)
        if context.rotation is not None:
            q = context.rotation.back(q, places)
        counts = context.real[:, :1, -fresh:] & (places >= context.start[:, None, None] + self.sinks)
        counts = counts.to(q.dtype)[..., None]  # [B, 1, S, 1]
        many = counts.sum(2).clamp(min=1)
        mean = (q * counts).sum(2) / many
        centered = (q - mean[:, :, None]) * counts
        spread = centered.transpose(-1, -2) @ centered / many[..., None]
        if context.rotation is None:
            return mean, spread
        cosines, sines = context.rotation.angles(torch.arange(total, total + self.future, device=q.device))
        depth = q.shape[3]
        whole = torch.eye(depth, device=q.device).view(1, 1, depth, depth)
        # Row i is where the mean turn brings unit vector i.
        turn = context.rotation.turn(whole, *(x.mean(0, keepdim=True).expand(depth, -1) for x in (cosines, sines)))[
            0, 0
        ]
        return mean @ turn, turn.T @ spread @ turn
