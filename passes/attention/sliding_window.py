"""Keep the last keys before each query (Longformer's window)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.expr import Expr
from effcompile.core.narrow import Alignment, window
from effcompile.core.policy import check_whole
from effcompile.passes.attention.pattern import StaticPattern


@dataclass(frozen=True)
class SlidingWindow(StaticPattern):
    """Keep the `window` keys that end at a query's own; without causal order, as many on the other side as well."""

    window: int = 1024

    name: ClassVar[str] = "sliding-window"
    paper: ClassVar[str] = "arXiv:2004.05150"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "window", least=1)

    @property
    def sink(self) -> bool:
        """Return False: first keys are dropped like others."""
        return False

    @property
    def reach(self) -> int:
        """Return the window."""
        return self.window

    def pattern(self, at: Alignment) -> Expr:
        """Return `own - window < k`."""
        return window(at, self.window)
