"""Keep keys and values as 8-bit floats, with one scale a token and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effcompile.core.cache import CacheFormat, Storage
from effcompile.core.policy import Exactness
from effcompile.core.site import CacheSite, Refusal
from effcompile.ops.kv.latent import Latent
from effcompile.ops.kv.per_token import PerToken8


@dataclass(frozen=True)
class Fp8(CacheFormat):
    """Keep every key and value vector as 8-bit floats (e4m3) and a half-precision scale, as accelerators with fp8 units have them.

    The error of an element is at most a sixteenth of it. Where integers are as fast, `int8-per-token` is more exact: its error is
    the vector's largest element over 254. Any head dimension.
    """

    name: ClassVar[str] = "fp8"
    paper: ClassVar[str] = "arXiv:2209.05433"
    exactness: ClassVar[Exactness] = "lossy"

    def storage(self, site: CacheSite) -> Storage | Refusal:
        """Return vectors of 8-bit floats."""
        return PerToken8(floats=True)

    def latents(self, site: CacheSite) -> Storage | Refusal:
        """Return latents of 8-bit floats."""
        return Latent(floats=True)
