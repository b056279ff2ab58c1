"""Describe what code is generated for: a chip's numbers, and the backend that runs on it.

Both are values: nothing here asks the machine anything (`effcompile/targets/detect.py` does) and nothing here knows
which chips exist. The catalog of devices is handed in, so that a user's own device joins like a built-in one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from effcompile.core.errors import EffError, unknown

Kind = Literal["cuda", "rocm", "cpu"]

BACKENDS = ("inductor", "triton", "aoti", "onnx", "tensorrt", "tensorrt-rtx")
PORTABLE = ("onnx", "tensorrt", "tensorrt-rtx")
"""Backends whose graphs hold standard operators alone, none of ours."""
DEFAULT_BACKEND = "inductor"

# Bits per element, by torch's dtype names with the two 8-bit floats as one, since they run at one rate everywhere.
_BITS = (
    ("float64", 64),
    ("float32", 32),
    ("tf32", 32),
    ("bfloat16", 16),
    ("float16", 16),
    ("float8", 8),
    ("int8", 8),
    ("float4", 4),
    ("int4", 4),
)
_SHORT = (("fp", "float"), ("bf16", "bfloat16"), ("f32", "float32"), ("f16", "float16"))


def dtype_name(dtype: object) -> str:
    """Return the canonical dtype word of `torch.bfloat16`, `"bf16"`, `"fp8"` or `"float8_e4m3fn"`.

    Raises `EFF-T103` for a word that is no dtype.
    """
    word = str(dtype).removeprefix("torch.").lower()
    if word.startswith(("float8_", "fp8_")):
        word = "float8"
    for short, full in _SHORT:
        if word == short or (short == "fp" and word.startswith("fp")):
            word = full + word.removeprefix(short)
            break
    word = {"half": "float16", "float": "float32", "double": "float64"}.get(word, word)
    if word not in dict(_BITS):
        raise unknown("EFF-T103", "dtype", str(dtype), dict(_BITS))
    return word


def element_bytes(dtype: object) -> float:
    """Return the bytes of one element of `dtype` (0.5 for the 4-bit ones)."""
    return dict(_BITS)[dtype_name(dtype)] / 8


@dataclass(frozen=True)
class Device:
    """Hold the rates of one chip, dense (no structured sparsity), as its data sheet gives them.

    `name` is the chip (`h200`); `compute` the instruction set that code is built for (`sm_90`, `gfx942`,
    `x86-64-avx512`). `peak_flops` pairs a dtype with FLOP/s (an op/s figure for the integer ones; matrix units with
    32-bit accumulation where the chip has them). `memory_bandwidth` and `l2_bandwidth` are bytes/s (L2 to all cores
    together), `memory_bytes` the device memory, `cache_bytes` the fast memory that one core (SM, CU) gives to one
    block, `exp_rate` exponentials/s of the whole chip, `call_overhead` seconds for launching one kernel.
    `source` links the data sheet; `modelled` names the fields that it does not give and that were derived instead.
    `common` is true for the chip that a bare compute word means. `vendor` is the maker of a CPU (`amd`, `intel`): libraries
    pick their code by it, so CPUs of one instruction set and two makers have rates of their own.
    """

    name: str
    kind: Kind
    compute: str
    peak_flops: tuple[tuple[str, float], ...]
    memory_bandwidth: float
    memory_bytes: int
    cache_bytes: int
    l2_bandwidth: float
    exp_rate: float
    cores: int
    source: str
    call_overhead: float = 0.0
    modelled: tuple[str, ...] = ()
    common: bool = True
    vendor: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.peak_flops, Mapping):
            object.__setattr__(self, "peak_flops", tuple(self.peak_flops.items()))
        fields = {field.name for field in dataclasses.fields(self)}
        if self.kind not in get_args(Kind):
            raise ValueError(f"{self.name}: kind `{self.kind}` is none of {get_args(Kind)}")
        if any(not word or ":" in word or word != word.strip().lower() for word in (self.name, self.compute)):
            raise ValueError(f"{self.name}: a target could not name this device; words are lower case, without colon")
        if stray := set(self.modelled) - fields:
            raise ValueError(f"{self.name}: `modelled` names no field of a device: {sorted(stray)}")
        sizes = (self.memory_bytes, self.cache_bytes, self.cores)
        rates = (self.memory_bandwidth, self.l2_bandwidth, self.exp_rate, *dict(self.peak_flops).values())
        if min(*sizes, *rates) <= 0 or not self.peak_flops:
            raise ValueError(f"{self.name}: every rate and size of a device is positive")

    @property
    def word(self) -> str:
        """Return the word that names this device in a target: the compute word where it is enough, else the chip."""
        return self.compute if self.common and self.kind != "cpu" else self.name

    def peak(self, dtype: object) -> float:
        """Return the peak FLOP/s for `dtype`; raises `EFF-T103` where the chip has no units for it."""
        word = dtype_name(dtype)
        for name, rate in self.peak_flops:
            if name == word:
                return rate
        have = ", ".join(name for name, _ in self.peak_flops)
        raise EffError("EFF-T103", f"{self.name} ({self.compute}) has no {word} units; it has {have}")

    def supports(self, dtype: object) -> bool:
        """Say whether the chip has units for `dtype`."""
        return dtype_name(dtype) in dict(self.peak_flops)

    def intensity(self, dtype: object) -> float:
        """Return FLOP per byte at the ridge of the roofline."""
        return self.peak(dtype) / self.memory_bandwidth

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**dataclasses.asdict(self), "peak_flops": dict(self.peak_flops), "modelled": list(self.modelled)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Device:
        """Build a device from `to_json`'s value; an unknown field is `EFF-T104`."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                raise unknown("EFF-T104", "field of a device", key, known)
        pairs = tuple((str(name), float(rate)) for name, rate in dict(data["peak_flops"]).items())
        return cls(**{**data, "peak_flops": pairs, "modelled": tuple(data.get("modelled", ()))})


@dataclass(frozen=True)
class Target:
    """Name a device and the backend that runs on it, written `sm_90` or `sm_120:tensorrt-rtx`."""

    device: Device
    backend: str = DEFAULT_BACKEND

    @classmethod
    def parse(cls, text: str, devices: Iterable[Device], backends: Iterable[str] = BACKENDS) -> Target:
        """Read `DEVICE[:BACKEND]`; DEVICE is a compute word (`sm_90`) or a chip (`h100`, `rtx 4090`), in any case.

        Raises `EFF-T101` for an unknown device and `EFF-T102` for an unknown backend, with the near matches.
        """
        catalog, known = tuple(devices), tuple(backends)
        word, colon, backend = (part.strip().lower() for part in text.partition(":"))
        if colon and backend not in known:
            raise unknown("EFF-T102", "backend", backend, known, hint=f"write {word}:BACKEND, or {word} alone")
        device = _find(word, catalog)
        if device is None:
            words = {name for each in catalog for name in (each.name, each.compute)}
            raise unknown("EFF-T101", "target", text.strip(), words, hint="eff targets")
        return cls(device, backend or DEFAULT_BACKEND)

    @property
    def portable(self) -> bool:
        """Tell whether the graph may hold standard operators alone."""
        return self.backend in PORTABLE

    def __str__(self) -> str:
        return self.device.word if self.backend == DEFAULT_BACKEND else f"{self.device.word}:{self.backend}"


def _find(word: str, catalog: tuple[Device, ...]) -> Device | None:
    """Return the chip of that name, else the common chip of that compute word."""
    plain = word.replace(" ", "").replace("-", "")
    for device in catalog:
        if plain == device.name.lower().replace(" ", "").replace("-", ""):
            return device
    same = [device for device in catalog if device.compute.lower() == word]
    return next((device for device in same if device.common), same[0] if same else None)
