"""Give the data-sheet rates of AMD Instinct chips.

Exponentials: the transcendental unit of a CDNA 3 compute unit gives 16 results per clock (a quarter of the vector
rate); CDNA 4 doubled it (white paper). L2 reads 128 bytes per clock on each of 16 channels per die, eight dies.
`cache_bytes` is the local data share of one compute unit.
"""

from __future__ import annotations

from effcompile.core.target import Device

_LAUNCH = 6e-6
_MODELLED = ("l2_bandwidth", "exp_rate", "call_overhead")

MI300X = Device(
    name="mi300x",
    kind="rocm",
    compute="gfx942",
    peak_flops=(
        ("float64", 163.4e12),
        ("float32", 163.4e12),
        ("tf32", 653.7e12),
        ("bfloat16", 1307.4e12),
        ("float16", 1307.4e12),
        ("float8", 2614.9e12),
        ("int8", 2614.9e12),
    ),
    memory_bandwidth=5.3e12,
    memory_bytes=192 * 10**9,
    cache_bytes=64 * 1024,
    l2_bandwidth=8 * 16 * 128 * 2.1e9,
    exp_rate=304 * 16 * 2.1e9,
    cores=304,
    source="https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",
    call_overhead=_LAUNCH,
    modelled=_MODELLED,
)

MI355X = Device(
    name="mi355x",
    kind="rocm",
    compute="gfx950",
    peak_flops=(
        ("float64", 78.6e12),
        ("float32", 157.3e12),
        ("bfloat16", 2.5e15),
        ("float16", 2.5e15),
        ("float8", 5.0e15),
        ("int8", 5.0e15),
        ("float4", 10.1e15),
    ),
    memory_bandwidth=8e12,
    memory_bytes=288 * 10**9,
    cache_bytes=160 * 1024,
    l2_bandwidth=8 * 16 * 128 * 2.4e9,
    exp_rate=256 * 32 * 2.4e9,
    cores=256,
    source="https://www.amd.com/en/products/accelerators/instinct/mi350/mi355x.html",
    call_overhead=_LAUNCH,
    modelled=_MODELLED,
)

DEVICES = (MI300X, MI355X)
