"""Drop tokens once, early, by the attention of the last query (FastV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.policy import check_whole
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.tokens import Kept, Pins, Step, TokenReduction, check_flag, check_pins, check_ratio
from effcompile.passes.tokens.ranking import drop, last_row, mass, unreadable


@dataclass(frozen=True)
class FastV(TokenReduction):
    """Drop a share of `ratio` of the tokens that are not pinned in front of layer `layer`, those that the last query read least.

    Pin the text of a vision-language prompt, `pinned=[[0,35],[-20,0]]`, so that image tokens alone are dropped. One row of
    attention decides, which needs no map of the others. The drop comes behind the attention of the layer before, in
    front of its feed-forward; the paper drops behind that.
    """

    ratio: float = 0.5
    layer: int = 2
    pinned: Pins = (0, -1)
    cache: bool = False
    left: int = 0

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "arXiv:2403.06764"

    def __post_init__(self) -> None:
        check_ratio(self, "ratio")
        check_whole(self, "layer", least=1)
        check_pins(self, "pinned")
        check_flag(self, "cache")
        check_whole(self, "left")

    def counts(self, tokens: int, attentions: int) -> tuple[int, ...]:
        """Return all tokens up to the layer, then the share that stays."""
        pins = self.pins(tokens)
        left = pins + round((tokens - pins) * (1 - self.ratio))
        return tuple(left if number >= self.layer - 1 else tokens for number in range(attentions))

    def refuses(self, site: AttentionSite) -> Refusal | None:
        """Refuse scores that are not those of queries, keys and predicate."""
        return unreadable(site)

    def choose(self, step: Step) -> Kept:
        """Keep what the last query reads most."""
        return drop(step, mass(step, last_row(step)))
