"""Keep keys and values in 8 or 4 bits, with scales of channels that were measured before (calibration)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from effcompile.core.cache import CacheFormat, Storage
from effcompile.core.errors import EffError
from effcompile.core.policy import Exactness, check_word, refused_value
from effcompile.core.ranges import Ranges
from effcompile.core.site import CacheSite, Refusal
from effcompile.ops.kv.fixed import ROW, Fixed

BITS = (8, 4)


@dataclass(frozen=True)
class StaticChannel(CacheFormat):
    """Keep tokens in `bits` bits with one scale `per` channel or tensor, as ONNX Runtime's GroupQueryAttention takes them.

    `ranges` is a file of `eff.calibrate_kv(model, samples, path)`: the largest magnitude of each channel in samples becomes the
    largest code. What is larger later is clipped, so samples have to be like what comes. There is nothing but codes to keep for
    a token: half the bytes of bfloat16 at 8 bits, a quarter at 4.
    """

    bits: int = 8
    per: str = "channel"
    ranges: str = ""

    name: ClassVar[str] = "static-channel"
    paper: ClassVar[str] = "https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md"
    exactness: ClassVar[Exactness] = "lossy"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise refused_value(self, "bits", f"one of {', '.join(map(str, BITS))}")
        check_word(self, "per", ("channel", "tensor"))

    def storage(self, site: CacheSite) -> Storage | Refusal:
        """Return rows of codes, or refuse head dimensions that are no multiples of 16."""
        for word, extent in (("keys", site.head_dim), ("values", site.value_dim)):
            if extent % ROW:
                reason = f"rows of {extent} channels of {word} are no multiple of {ROW}"
                return Refusal("EFF-K204", reason, "int8-per-token, which takes any head dimension")
        return Fixed(self.bits)

    def constants(self, site: CacheSite) -> dict[str, Tensor]:
        """Return scales of keys and values, float32 `[Hkv, D]`."""
        if not self.ranges:
            raise EffError(
                "EFF-K207",
                f"`{self.name}` needs to know how large keys and values of this model get",
                site=site.id,
                hint='eff.calibrate_kv(model, samples, "kv.json"), then static-channel{ranges=kv.json}',
            )
        keys, values = Ranges.load(self.ranges).of(site)
        levels = 2 ** (self.bits - 1) - 1
        return {"k_scales": self._scales(keys, levels), "v_scales": self._scales(values, levels)}

    def _scales(self, most: Tensor, levels: int) -> Tensor:
        most = most.amax().expand_as(most) if self.per == "tensor" else most
        return (most / levels).masked_fill(most == 0, 1.0)
