"""Keep the first keys and the last ones before each query (StreamingLLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.expr import Expr
from effcompile.core.narrow import Alignment, window
from effcompile.core.policy import check_whole
from effcompile.passes.attention.pattern import StaticPattern


@dataclass(frozen=True)
class SinkWindow(StaticPattern):
    """Keep the first `sinks` keys and the `window` keys that end at a query's own.

    Models put probability that nothing needs on the first tokens; without them a window changes every softmax.
    """

    window: int = 1024
    sinks: int = 4

    name: ClassVar[str] = "sink-window"
    paper: ClassVar[str] = "arXiv:2309.17453"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "window", least=1)
        check_whole(self, "sinks", least=1)

    @property
    def sink(self) -> bool:
        """Return True."""
        return True

    @property
    def reach(self) -> int:
        """Return window and sinks together."""
        return self.window + self.sinks

    def pattern(self, at: Alignment) -> Expr:
        """Return `own - window < k or k < sinks`."""
        return window(at, self.window, self.sinks)
