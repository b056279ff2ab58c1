"""Keep keys in two planes of bits, of which the lower one is read where attention is flat (SpAtten)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.cache import CacheFormat, Storage
from effcompile.core.policy import Exactness, refused_value
from effcompile.core.site import CacheSite, Refusal
from effcompile.ops.kv import two_plane


@dataclass(frozen=True)
class TwoPlane(CacheFormat):
    """Keep keys in 8 + 4 bits and values in 8; read the 4 where no probability of a query reaches `theta` without them.

    With `theta=0` the lower plane is never read, above 1 always. `stale` decides by the step before, which saves reading the upper
    plane twice. Even head dimensions.
    """

    theta: float = 0.1
    stale: bool = False

    name: ClassVar[str] = "two-plane"
    paper: ClassVar[str] = "arXiv:2012.09852"
    exactness: ClassVar[Exactness] = "lossy"

    def __post_init__(self) -> None:
        if isinstance(self.theta, bool) or not isinstance(self.theta, int | float) or not self.theta >= 0:
            raise refused_value(self, "theta", "a number of at least 0")
        if not isinstance(self.stale, bool):
            raise refused_value(self, "stale", "True or False")

    def storage(self, site: CacheSite) -> Storage | Refusal:
        """Return two planes, or refuse an odd number of channels."""
        if site.head_dim % 2:
            reason = f"two channels share a byte, and keys have {site.head_dim}"
            return Refusal("EFF-K204", reason, "int8-per-token, which takes any head dimension")
        return two_plane.TwoPlane(float(self.theta), self.stale)
