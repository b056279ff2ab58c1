"""Merge tokens that are alike, a few behind every attention (ToMe)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from effcompile.core.mask import Mask
from effcompile.core.policy import check_whole, refused_value
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.tokens import Kept, Pins, Step, TokenReduction, check_pins, check_ratio, spans
from effcompile.ops.tokens.choice import match_pairs


@dataclass(frozen=True)
class ToMe(TokenReduction):
    """Merge until a share of `ratio` of the tokens is gone behind the last layer, as many behind each but the `first`.

    Tokens are alike where the means of their keys over heads are. A token that stands for several weighs that much more in
    attention (log of the number, added to its scores). Original positions get the value of what they became part of.

    With `inflect` steps are not equal: -1 lets them fall linearly from twice as many to none, which leaves fewer tokens on average,
    1 lets them rise so, as the paper's code does.
    """

    ratio: float = 0.5
    first: int = 0
    inflect: float = 0.0
    pinned: Pins = (0,)
    left: int = 0

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "arXiv:2210.09461"
    merges: ClassVar[bool] = True
    placed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ratio(self, "ratio")
        check_whole(self, "first")
        check_pins(self, "pinned")
        check_whole(self, "left")
        if isinstance(self.inflect, bool) or not isinstance(self.inflect, int | float) or not -1 <= self.inflect <= 1:
            raise refused_value(self, "inflect", "between -1 and 1")

    def counts(self, tokens: int, attentions: int) -> tuple[int, ...]:
        """Return steps that are equal, rise or fall, none larger than half of the tokens that are not pinned."""
        layers, pins = max(1, attentions - self.first), self.pins(tokens)
        target, left, found = tokens - int(self.ratio * tokens), tokens, []
        for number in range(attentions):
            if number >= self.first:
                steps = number - self.first + 1
                share = steps + self.inflect * (steps * (steps - 1) / max(1, layers - 1) - steps)
                wanted = max(target, tokens - math.floor((tokens - target) * share / layers + 1e-9))
                left = max(wanted, left - max(0, left // 2 - pins))
            found.append(left)
        return tuple(found)

    def most(self, tokens: int) -> int:
        """Return how many of `tokens` can be merged at once."""
        return max(0, tokens // 2 - sum(count for _, count in spans(self.pinned)))

    def refuses(self, site: AttentionSite) -> Refusal | None:
        """Refuse masks: a merged token has no single position, and would show what a mask hides."""
        if not isinstance(site.mask, Mask) or not site.mask.is_full:
            return Refusal(
                "EFF-R106",
                f"mask {site.mask}: a merged token has no position of its own",
                "spatten drops tokens instead",
            )
        return None

    def choose(self, step: Step) -> Kept:
        """Insert the matching."""
        held, merged, stable = step.held, step.tokens - step.left, not step.portable

        def pairs(keys: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return match_pairs(keys, rest[0] if rest else None, merged, stable)

        return Kept(*step.edit.inline_all(pairs, step.call.k, *([] if held is None else [held])))
