"""Merge tokens of an image around each self-attention, and give all of them its result (ToMeSD)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.core.mask import Mask
from effcompile.core.policy import check_whole, refused_value
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.tokens import Kept, Pins, Step, TokenReduction, check_pins, check_ratio
from effcompile.ops.tokens.choice import match_cells


@dataclass(frozen=True)
class ToMeSD(TokenReduction):
    """Merge a share of `ratio` of an image's tokens into one corner of the 2 x 2 cells that they stand in or are most like.

    Tokens are merged in front of the projections of queries, keys and values, plain means, and every token of a group gets what the
    attention's result became; feed-forward, cross attention and residual sums see all tokens. `grid` is height and width of the
    image in tokens, the last ones of the sequence; by default the largest square. Streams of fewer than `least` tokens stay as they
    are, as the lower levels of a U-Net do in the paper. The corner is always the first one; the paper draws it.
    """

    ratio: float = 0.5
    grid: tuple[int, ...] = ()
    least: int = 0
    pinned: Pins = ()
    left: int = 0

    name: ClassVar[str] = "tomesd"
    paper: ClassVar[str] = "arXiv:2303.17604"
    merges: ClassVar[bool] = True
    placed: ClassVar[bool] = False
    around: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ratio(self, "ratio")
        if len(self.grid) not in (0, 2) or not all(isinstance(n, int) and n > 0 for n in self.grid):
            raise refused_value(self, "grid", "height and width in tokens, such as [32,64]")
        check_whole(self, "least")
        check_pins(self, "pinned")
        if self.pinned:
            raise refused_value(self, "pinned", "empty: tokens in front of the grid stay, all others may be merged")
        check_whole(self, "left")

    def shape(self, tokens: int) -> tuple[int, int]:
        """Return height and width of the grid in a sequence of `tokens` tokens; raises EFF-R115 where it does not fit."""
        side = math.isqrt(tokens)
        height, width = self.grid or (side, side)
        if height * width > tokens:
            raise EffError(
                "EFF-R115",
                f"`{self.spelled}`: a grid of {height} x {width} in a sequence of {tokens} tokens",
                hint="tomesd{grid=[HEIGHT,WIDTH]}, in tokens",
            )
        return height, width

    def counts(self, tokens: int, attentions: int) -> tuple[int, ...]:
        """Return how many tokens reach each attention: all but those that are merged into others."""
        height, width = self.shape(tokens)
        corners = -(-height // 2) * -(-width // 2)
        merged = min(height * width - corners, int(height * width * self.ratio)) if tokens >= self.least else 0
        return (tokens - merged,) * attentions

    def most(self, tokens: int) -> int:
        """Return how many of `tokens` can be merged at once."""
        height, width = self.shape(tokens)
        return height * width - -(-height // 2) * -(-width // 2)

    def refuses(self, site: AttentionSite) -> Refusal | None:
        """Refuse masks: a merged token has no single position, and would show what a mask hides."""
        if not isinstance(site.mask, Mask) or not site.mask.is_full:
            return Refusal("EFF-R106", f"mask {site.mask}: a merged token has no position of its own")
        return None

    def choose(self, step: Step) -> Kept:
        """Insert the matching, by the activations themselves."""
        assert step.stream is not None
        grid, merged, stable = self.shape(step.tokens), step.tokens - step.left, not step.portable

        def pairs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return match_cells(x, grid, merged, stable)

        return Kept(*step.edit.inline_all(pairs, step.stream))
