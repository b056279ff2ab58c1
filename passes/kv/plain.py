"""Keep keys and values as the model makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.cache import CacheFormat, Storage
from effcompile.core.policy import Exactness
from effcompile.core.site import CacheSite, Refusal
from effcompile.ops.kv import plain
from effcompile.ops.kv.latent import Latent


@dataclass(frozen=True)
class Plain(CacheFormat):
    """Keep keys and values in the model's own dtype: what an eviction without a format is used with. Any head dimension."""

    name: ClassVar[str] = "plain"
    paper: ClassVar[str] = ""
    exactness: ClassVar[Exactness] = "rounding"

    def storage(self, site: CacheSite) -> Storage | Refusal:
        """Return unpacked tokens."""
        return plain.Plain()

    def latents(self, site: CacheSite) -> Storage | Refusal:
        """Return unpacked latents."""
        return Latent(bits=16)
