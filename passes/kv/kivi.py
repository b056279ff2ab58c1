"""Keep keys per channel and values per token in 4 or 2 bits, and the last tokens as they are (KIVI)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.cache import CacheFormat, Storage
from effcompile.core.policy import Exactness, check_whole, refused_value
from effcompile.core.site import CacheSite, Refusal
from effcompile.ops.kv.grouped import PANEL, Grouped

BITS = (4, 2)


@dataclass(frozen=True)
class Kivi(CacheFormat):
    """Keep groups of `group` tokens per channel (keys) and of `group` channels per token (values) in `bits` bits.

    A few channels of keys are large in every token, so a scale of their own costs the others nothing. The last `residual`
    tokens, which attention reads most, stay unpacked; a context that is no longer is exact. Models with grouped heads need 4 bits.
    """

    bits: int = 4
    group: int = 32
    residual: int = 128

    name: ClassVar[str] = "kivi"
    paper: ClassVar[str] = "arXiv:2402.02750"
    exactness: ClassVar[Exactness] = "lossy"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise refused_value(self, "bits", f"one of {', '.join(map(str, BITS))}")
        check_whole(self, "group", least=PANEL, multiple=PANEL)
        check_whole(self, "residual", least=0)
        if self.residual < self.group or self.residual % self.group:
            raise refused_value(self, "residual", f"a multiple of group={self.group}, and at least that")

    def storage(self, site: CacheSite) -> Storage | Refusal:
        """Return packed groups, or refuse head dimensions that the groups do not divide."""
        for word, extent in (("keys", site.head_dim), ("values", site.value_dim)):
            if extent % self.group:
                return Refusal(
                    "EFF-K204",
                    f"groups of {self.group} channels do not divide the {extent} of {word}",
                    "another `group`, or int8-per-token, which takes any head dimension",
                )
        return Grouped(self.bits, self.group, self.residual)
