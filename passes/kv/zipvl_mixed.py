"""Keep tokens that are read much in more bits than the others (ZipVL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.cache import CacheFormat, Storage, Tiers
from effcompile.core.policy import Exactness, check_share, check_whole, refused_value
from effcompile.core.site import CacheSite, Refusal
from effcompile.ops.kv.grouped import PANEL, Grouped


@dataclass(frozen=True)
class ZipVLMixed(CacheFormat):
    """Keep the tokens that hold `mass` of the attention in 4 bits, the others in 2, and the last `residual` as they are.

    In a prompt the `recent` last and `spread` other queries judge; the share of tokens that they favor, at least `floor`, is each
    layer's own and stays. `interval` generated tokens are divided at a time, by all queries since they came. Keys and values are
    packed as `kivi` packs them, in groups of `group`.
    """

    mass: float = 0.97
    group: int = 32
    residual: int = 128
    interval: int = 128
    recent: int = 64
    spread: int = 64
    floor: float = 0.1

    name: ClassVar[str] = "zipvl-mixed"
    paper: ClassVar[str] = "arXiv:2410.08584"
    exactness: ClassVar[Exactness] = "lossy"

    def __post_init__(self) -> None:
        check_share(self, "mass")
        check_share(self, "floor")
        check_whole(self, "group", least=PANEL, multiple=PANEL)
        check_whole(self, "residual")
        check_whole(self, "recent", least=1)
        check_whole(self, "spread")
        check_whole(self, "interval", least=1)
        if self.interval % self.group:
            raise refused_value(self, "interval", f"a multiple of group={self.group}")

    @property
    def tiers(self) -> Tiers:
        """Return both numbers of bits, and who gets which."""
        return Tiers(
            (4, 2),
            self.group,
            self.residual,
            self.interval,
            float(self.mass),
            self.recent,
            self.spread,
            float(self.floor),
        )

    def storage(self, site: CacheSite) -> Storage | Refusal:
        """Return how the first part is stored, or refuse head dimensions that the groups do not divide."""
        for word, extent in (("keys", site.head_dim), ("values", site.value_dim)):
            if extent % self.group:
                reason = f"groups of {self.group} channels do not divide the {extent} of {word}"
                return Refusal("EFF-K204", reason, "another `group`, or int8-per-token, which takes any head dimension")
        return Grouped(4, self.group, self.group)
