"""Keep keys and values in 8 bits, with one scale a token and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.cache import CacheFormat, Storage
from effcompile.core.policy import Exactness
from effcompile.core.site import CacheSite, Refusal
from effcompile.ops.kv.latent import Latent
from effcompile.ops.kv.per_token import PerToken8


@dataclass(frozen=True)
class Int8PerToken(CacheFormat):
    """Keep every key and value vector as 8-bit integers and a half-precision scale: 0.52 of the bytes of bfloat16 at 64 channels.

    The error of an element is at most half of its vector's scale, which is its largest magnitude over 127. Any head dimension.
    """

    name: ClassVar[str] = "int8-per-token"
    paper: ClassVar[str] = ""
    exactness: ClassVar[Exactness] = "lossy"

    def storage(self, site: CacheSite) -> Storage | Refusal:
        """Return 8-bit vectors."""
        return PerToken8()

    def latents(self, site: CacheSite) -> Storage | Refusal:
        """Return 8-bit latents, and rotated keys with scales of their own."""
        return Latent()
