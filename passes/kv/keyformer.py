"""Keep the tokens that queries have read most, with noise on their scores (Keyformer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effcompile.core.eviction import ALL, CacheEviction, Context, Step
from effcompile.core.policy import Exactness, check_share, check_whole, refused_value
from effcompile.ops.kv import scores


@dataclass(frozen=True)
class Keyformer(CacheEviction):
    """Keep the share `keep` of a prompt, at least `least` tokens; from then on one goes for each that arrives.

    What a token has gathered is the sum, over all queries so far, of softmax((score + noise) / temperature); the noise is
    Gumbel's, so that tokens which were read less have a chance. The temperature rises from `cold` to `hot` over `horizon`
    generated tokens. Of the budget the share `recent` is for the last tokens. Every sequence of a batch keeps its own tokens.
    The noise depends on `seed`, layer, head, query and key only, so that a run can be repeated and no sequence depends on
    those beside it; `noise=False` leaves it out, for tasks that need exact retrieval. Attention itself has neither noise nor
    temperature. With `probes`, so many queries of a prompt, evenly spread, stand for all of them: scoring a prompt takes time
    with its length then, instead of the square of it.
    """

    keep: float = 0.5
    recent: float = 0.3
    least: int = 128
    noise: bool = True
    cold: float = 1.0
    hot: float = 2.0
    horizon: int = 128
    seed: int = 0
    probes: int = 0

    name: ClassVar[str] = "keyformer"
    paper: ClassVar[str] = "arXiv:2403.09054"
    exactness: ClassVar[Exactness] = "lossy"
    steps: ClassVar[bool] = True
    sums: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share(self, "keep")
        check_share(self, "recent")
        check_whole(self, "least", least=2)
        check_whole(self, "horizon", least=1)
        check_whole(self, "seed", least=0)
        check_whole(self, "probes", least=0)
        if self.recent == 1:
            raise refused_value(self, "recent", "below 1: what is not recent competes for the rest")
        if not isinstance(self.noise, bool):
            raise refused_value(self, "noise", "True or False")
        for field in ("cold", "hot"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise refused_value(self, field, "a temperature above 0")

    def stays(self, total: int) -> int:
        """Return the share, at least `least`."""
        return ALL if self.keep == 1 else max(self.least, int(self.keep * total))

    def last(self) -> float:
        """Return the share for the last tokens."""
        return self.recent

    def rank(self, context: Context) -> Tensor:
        """Rank by what tokens have gathered; the last ones stay."""
        many = int(self.recent * context.budget)
        return torch.where(context.positions >= context.total - many, torch.inf, context.mass)

    def judges(self, count: int) -> int:
        """Return how many probes there are, or all."""
        return min(count, self.probes or count)

    def gain(self, step: Step) -> Tensor:
        """Return what the queries give to each token: a row of 1 in all for each query head."""
        heads = step.positions.shape[1]
        found, asked = step.scores, step.scores.shape[1]
        if self.noise:
            columns = scores.by_query_head(step.positions - step.start[:, None, None], asked)
            rows = step.rows[None] - step.start[:, None]
            found = found + scores.gumbel(self.seed, step.layer, asked, rows, columns)
        warm = self.cold + (self.hot - self.cold) * (step.after.float() / self.horizon).clamp(max=1.0)
        return scores.by_key_head(scores.weights(found / warm).sum(2), heads)
