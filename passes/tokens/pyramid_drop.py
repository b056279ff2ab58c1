"""Drop tokens in stages by the attention of the last query (PyramidDrop)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.policy import check_whole, refused_value
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.tokens import Kept, Pins, Step, TokenReduction, check_flag, check_pins
from effcompile.passes.tokens.ranking import drop, last_row, mass, unreadable


@dataclass(frozen=True)
class PyramidDrop(TokenReduction):
    """Keep shares `keep` of the tokens that are not pinned, stage by stage; stages end at equal distances over the layers.

    Three shares drop tokens behind a quarter, a half and three quarters of the layers. The last query decides; its row of attention
    is computed from queries and keys that are there.
    """

    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    pinned: Pins = (0, -1)
    cache: bool = False
    left: int = 0

    name: ClassVar[str] = "pyramid-drop"
    paper: ClassVar[str] = "arXiv:2410.17247"

    def __post_init__(self) -> None:
        shares = self.keep
        fit = isinstance(shares, tuple) and all(
            isinstance(n, int | float) and not isinstance(n, bool) and 0 < n <= 1 for n in shares
        )
        if not fit or not shares or list(shares) != sorted(shares, reverse=True):
            raise refused_value(self, "keep", "a list of shares in (0, 1] that do not rise, such as [0.5,0.25]")
        check_pins(self, "pinned")
        check_flag(self, "cache")
        check_whole(self, "left")

    def counts(self, tokens: int, attentions: int) -> tuple[int, ...]:
        """Return the stages."""
        pins, stages = self.pins(tokens), len(self.keep) + 1
        shares = (1.0, *self.keep)
        found = []
        for number in range(attentions):
            stage = min(stages - 1, (number + 1) * stages // max(1, attentions))
            found.append(pins + round((tokens - pins) * shares[stage]))
        return tuple(found)

    def refuses(self, site: AttentionSite) -> Refusal | None:
        """Refuse scores that are not those of queries, keys and predicate."""
        return unreadable(site)

    def choose(self, step: Step) -> Kept:
        """Keep what the last query reads most."""
        return drop(step, mass(step, last_row(step)))
