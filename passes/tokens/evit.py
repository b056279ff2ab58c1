"""Drop patches by the attention of the class token, and sum them up in one more token (EViT)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effcompile.core.mask import Mask
from effcompile.core.policy import check_share, check_whole
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.tokens import Kept, Pins, Step, TokenReduction, check_pins
from effcompile.passes.tokens.ranking import first_row, keep_best, mass


@dataclass(frozen=True)
class EViT(TokenReduction):
    """Keep a share of `keep` of the patches behind every third layer but the last, with the dropped ones as one token.

    That token is the sum of the dropped ones, each times the attention that the class token, the first one, gives to it.
    """

    keep: float = 0.7
    every: int = 3
    pinned: Pins = (0,)
    left: int = 0

    name: ClassVar[str] = "evit"
    paper: ClassVar[str] = "arXiv:2202.07800"
    placed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_share(self, "keep")
        check_whole(self, "every", least=1)
        check_pins(self, "pinned")
        check_whole(self, "left")

    def counts(self, tokens: int, attentions: int) -> tuple[int, ...]:
        """Return CLS, the share of patches and one more token, behind layers 3, 6, 9 of 12 (counted from 0)."""
        found, left, pins = [], tokens, self.pins(tokens)
        for number in range(attentions):
            if number and number % self.every == 0:
                left = min(left, pins + math.ceil(self.keep * (left - pins)) + 1)
            found.append(left)
        return tuple(found)

    def refuses(self, site: AttentionSite) -> Refusal | None:
        """Refuse masks: the summed-up token has no position."""
        if not isinstance(site.mask, Mask) or not site.mask.is_full:
            return Refusal(
                "EFF-R106", f"mask {site.mask}: the summed-up token has no position", "spatten drops tokens only"
            )
        return None

    def choose(self, step: Step) -> Kept:
        """Keep what the first token reads most, and weigh the rest."""
        scores = mass(step, first_row(step))
        index = keep_best(step, scores, step.left - 1)

        def rest(values: Tensor, kept: Tensor) -> Tensor:
            return values.scatter(1, kept, torch.zeros((), dtype=values.dtype, device=values.device).expand(kept.shape))

        return Kept(index, weights=step.edit.inline(rest, scores, index))
