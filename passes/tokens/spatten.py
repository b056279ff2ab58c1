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
from effcompile.passes.tokens.heads import heads_differ
from effcompile.passes.tokens.ranking import drop, mass, unreadable

_UNPRUNED, _ALL_HEADS = 0.15, 0.3  # of the layers, at the beginning, in which all tokens and all heads stay


@dataclass(frozen=True)
class SpAtten(TokenReduction):
    """Keep a share of `keep` of the tokens, averaged over layers: all in the first 15 % of them, then less and less.

    A token counts by the attention that it got from all rows and heads, added up over layers. What is dropped is in no later layer.
    `fair` divides by the rows that may read a token, since causal order shows early tokens to more rows.

    With `heads` below 1 heads go likewise, that share of them on average, from 30 % of the layers on: those whose results had the
    smallest absolute values so far. Query heads that share keys go together.
    """

    keep: float = 0.7
    heads: float = 1.0
    fair: bool = False
    pinned: Pins = (0, -1)
    cache: bool = False
    left: int = 0
    heads_left: int = 0

    name: ClassVar[str] = "spatten"
    paper: ClassVar[str] = "arXiv:2012.09852"
    watches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share(self, "keep")
        check_pins(self, "pinned")
        check_flag(self, "fair")
        check_flag(self, "cache")
        check_whole(self, "left")
        check_share(self, "heads")
        check_whole(self, "heads_left")

    def counts(self, tokens: int, attentions: int) -> tuple[int, ...]:
        """Return the linear schedule of the paper: ratios rise from r_start to r_end, with r_start + r_end = 2 r_avg."""
        least = max(1, self.pins(tokens))
        return tuple(max(least, n) for n in _schedule(tokens, self.keep, _UNPRUNED, attentions))

    def head_counts(self, heads: int, attentions: int) -> tuple[int, ...]:
        """Return the same schedule for heads, of which one stays at least."""
        return tuple(max(1, n) for n in _schedule(heads, self.heads, _ALL_HEADS, attentions))

    def refuses(self, site: AttentionSite) -> Refusal | None:
        """Refuse scores that are not those of queries, keys and predicate, and masks of single heads where heads go."""
        return unreadable(site) or (heads_differ(site) if self.heads < 1 else None)

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


def _schedule(total: int, keep: float, whole: float, attentions: int) -> list[int]:
    """Return how many of `total` are left behind each attention: all in the first share `whole` of them, then less and less."""
    begin, average = math.ceil(whole * attentions), 1 - keep
    end = min(1.5 * average, (1 + average) / 2)
    start, steps = 2 * average - end, max(1, attentions - begin - 1)
    ratios = [start + (end - start) * (n - begin) / steps if n >= begin else 0.0 for n in range(attentions)]
    return [math.floor(total * (1 - ratio) + 1e-9) for ratio in ratios]
