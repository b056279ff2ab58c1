"""Drop the tokens that got the least attention so far, more of them layer by layer (SpAtten's cascade)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effcompile.core.policy import check_share, check_whole
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.tokens import Kept, Pins, Step, TokenReduction, check_flag, check_pins
from effcompile.passes.tokens.ranking import drop, mass, unreadable

_UNPRUNED = 0.15  # of the layers, at the beginning


@dataclass(frozen=True)
class SpAtten(TokenReduction):
    """Keep a share of `keep` of the tokens, averaged over layers: all in the first 15 % of them, then less and less.

    A token counts by the attention that it got from all rows and heads, added up over layers. What is dropped is in no later layer.
    `fair` divides by the rows that may read a token, since causal order shows early tokens to more rows.
    """

    keep: float = 0.7
    fair: bool = False
    pinned: Pins = (0, -1)
    cache: bool = False
    left: int = 0

    name: ClassVar[str] = "spatten"
    paper: ClassVar[str] = "arXiv:2012.09852"
    watches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share(self, "keep")
        check_pins(self, "pinned")
        check_flag(self, "fair")
        check_flag(self, "cache")
        check_whole(self, "left")

    def counts(self, tokens: int, attentions: int) -> tuple[int, ...]:
        """Return the linear schedule of the paper: ratios rise from r_start to r_end, with r_start + r_end = 2 r_avg."""
        begin, average, least = math.ceil(_UNPRUNED * attentions), 1 - self.keep, max(1, self.pins(tokens))
        end = min(1.5 * average, (1 + average) / 2)
        start, steps = 2 * average - end, max(1, attentions - begin - 1)
        found = []
        for number in range(attentions):
            ratio = start + (end - start) * (number - begin) / steps if number >= begin else 0.0
            found.append(max(least, math.floor(tokens * (1 - ratio) + 1e-9)))
        return tuple(found)

    def refuses(self, site: AttentionSite) -> Refusal | None:
        """Refuse scores that are not those of queries, keys and predicate."""
        return unreadable(site)

    def observe(self, step: Step) -> None:
        """Add up the attention that each token gets."""
        got = mass(step)
        if self.fair and step.call.keep is not None:
            got = step.edit.inline(_per_row, got)
        before = step.state.get("mass")
        step.state["mass"] = got if before is None else step.edit.call(torch.ops.aten.add.Tensor, before, got)

    def choose(self, step: Step) -> Kept:
        """Keep those with the most attention so far."""
        return drop(step, step.state["mass"])


def _per_row(got: Tensor) -> Tensor:
    """Divide by the rows that read a token under causal order."""
    count = got.shape[1]
    return got / (count - torch.arange(count, device=got.device))
