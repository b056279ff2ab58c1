"""Keep the first tokens and the last ones (StreamingLLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effcompile.core.eviction import CacheEviction, Context
from effcompile.core.policy import Exactness, check_whole


@dataclass(frozen=True)
class SinkWindow(CacheEviction):
    """Keep the first `sinks` tokens, on which models put attention that they need nowhere else, and the last `window`.

    Positions go on counting the whole context: keys keep the rotation that they have.
    """

    window: int = 1024
    sinks: int = 4

    name: ClassVar[str] = "sink-window"
    paper: ClassVar[str] = "arXiv:2309.17453"
    exactness: ClassVar[Exactness] = "lossy"
    steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_whole(self, "window", least=1)
        check_whole(self, "sinks", least=0)

    def stays(self, total: int) -> int:
        """Return sinks and window."""
        return self.sinks + self.window

    def first(self) -> int:
        """Return the sinks."""
        return self.sinks

    def rank(self, context: Context) -> Tensor:
        """Rank by position, the sinks first."""
        place = context.positions - context.start[:, None, None]
        return torch.where(place < self.sinks, torch.inf, place.double())
