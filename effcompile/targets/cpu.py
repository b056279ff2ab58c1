"""Model a CPU from its instruction set, its cores and a clock; every rate here is modelled, none is a data sheet's.

Peak FLOP/s = cores x clock x FLOP per cycle and core, where the last counts two fused multiply-add pipes. Real chips
differ (clock under load, one pipe, double-pumped 512-bit units), so plans that matter should use
`detect.calibrate_cpu`.
"""

from __future__ import annotations

from dataclasses import dataclass

from effcompile.core.target import Device

_MANUAL = "https://www.intel.com/content/www/us/en/docs/intrinsics-guide/index.html"
_PER_CORE_BANDWIDTH = 12e9  # bytes/s that one core draws from memory before the channels are the limit
_SOCKET_BANDWIDTH = 200e9
_DISPATCH = 2e-6  # seconds for one operator call, arguments boxed and checked


@dataclass(frozen=True)
class Isa:
    """Say what one core of an instruction set does per clock cycle.

    `fp32` FLOP (two pipes of fused multiply-add), `bf16` and `int8` as factors on it (1: converted first, no units of
    its own), `exps` exponentials of a vectorized polynomial.
    """

    compute: str
    fp32: float
    bf16: float
    int8: float
    exps: float


AVX512 = Isa("x86-64-avx512", 64, 1, 1, 1.3)
AVX512_VNNI = Isa("x86-64-avx512", 64, 1, 4, 1.3)
AVX512_BF16 = Isa("x86-64-avx512", 64, 2, 4, 1.3)
AVX512_BF16_NARROW = Isa("x86-64-avx512", 32, 2, 4, 0.8)  # Zen 4: 512-bit instructions on 256-bit units
AMX = Isa("x86-64-amx", 64, 16, 32, 1.3)
AVX2 = Isa("x86-64-avx2", 32, 1, 1, 0.8)
X86 = Isa("x86-64", 8, 1, 1, 0.2)
SVE256 = Isa("aarch64-sve", 32, 4, 8, 0.6)
NEON = Isa("aarch64-neon", 16, 1, 1, 0.4)


def model(
    isa: Isa,
    cores: int,
    clock: float,
    *,
    memory_bytes: int = 32 * 10**9,
    cache_bytes: int = 1024 * 1024,
    vendor: str = "",
    source: str = _MANUAL,
) -> Device:
    """Build the modelled CPU device for `cores` at `clock` Hz with `cache_bytes` of private cache per core."""
    fp32 = cores * clock * isa.fp32
    return Device(
        name="cpu",
        kind="cpu",
        compute=isa.compute,
        peak_flops=(
            ("float64", fp32 / 2),
            ("float32", fp32),
            ("bfloat16", fp32 * isa.bf16),
            ("float16", fp32),
            ("int8", fp32 * isa.int8),
        ),
        memory_bandwidth=min(cores * _PER_CORE_BANDWIDTH, _SOCKET_BANDWIDTH),
        memory_bytes=memory_bytes,
        cache_bytes=cache_bytes,
        l2_bandwidth=cores * clock * 32,
        exp_rate=cores * clock * isa.exps,
        cores=cores,
        source=source,
        vendor=vendor,
        call_overhead=_DISPATCH,
        modelled=("peak_flops", "memory_bandwidth", "l2_bandwidth", "exp_rate", "call_overhead"),
    )


# What `--target cpu` means where no machine is asked: an ordinary eight-core server slice.
CPU = model(AVX512_VNNI, cores=8, clock=2.6e9)

DEVICES = (CPU,)
