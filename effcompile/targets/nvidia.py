"""Give the data-sheet rates of NVIDIA chips, Turing to Blackwell.

Exponentials: 16 results per clock and SM on every capability here (arithmetic-throughput table of the CUDA programming
guide), at the clock that the peak rates are quoted for. `cache_bytes` is the shared memory one block may have (the same
guide's table of technical specifications). L2 bandwidth is published for A100 only (5120 bytes per clock); T4's is the
microbenchmark of arXiv 1903.07486; elsewhere it is modelled as 32 bytes per clock and SM for the data-center parts and
16 for those with the GeForce memory system. A launch costs about 5 microseconds outside a CUDA graph.
"""

from __future__ import annotations

from effcompile.core.target import Device

_LAUNCH = 5e-6
_MODELLED = ("l2_bandwidth", "exp_rate", "call_overhead")

T4 = Device(
    name="t4",
    kind="cuda",
    compute="sm_75",
    peak_flops=(("float32", 8.1e12), ("float16", 65e12), ("int8", 130e12)),
    memory_bandwidth=300e9,
    memory_bytes=16 * 10**9,
    cache_bytes=64 * 1024,
    l2_bandwidth=1.27e12,
    exp_rate=40 * 16 * 1.59e9,
    cores=40,
    source="https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf",
    call_overhead=_LAUNCH,
    modelled=_MODELLED,
)

A100 = Device(
    name="a100",
    kind="cuda",
    compute="sm_80",
    peak_flops=(
        ("float32", 19.5e12),
        ("tf32", 156e12),
        ("bfloat16", 312e12),
        ("float16", 312e12),
        ("int8", 624e12),
    ),
    memory_bandwidth=2039e9,
    memory_bytes=80 * 10**9,
    cache_bytes=163 * 1024,
    l2_bandwidth=5120 * 1.41e9,
    exp_rate=108 * 16 * 1.41e9,
    cores=108,
    source="https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
    call_overhead=_LAUNCH,
    modelled=("exp_rate", "call_overhead"),
)

A10 = Device(
    name="a10",
    kind="cuda",
    compute="sm_86",
    peak_flops=(
        ("float32", 31.2e12),
        ("tf32", 62.5e12),
        ("bfloat16", 125e12),
        ("float16", 125e12),
        ("int8", 250e12),
    ),
    memory_bandwidth=600e9,
    memory_bytes=24 * 10**9,
    cache_bytes=99 * 1024,
    l2_bandwidth=72 * 16 * 1.695e9,
    exp_rate=72 * 16 * 1.695e9,
    cores=72,
    source="https://www.nvidia.com/en-us/data-center/products/a10-gpu/",
    call_overhead=_LAUNCH,
    modelled=_MODELLED,
)

L4 = Device(
    name="l4",
    kind="cuda",
    compute="sm_89",
    peak_flops=(
        ("float32", 30.3e12),
        ("tf32", 60e12),
        ("bfloat16", 121e12),
        ("float16", 121e12),
        ("float8", 242.5e12),
        ("int8", 242.5e12),
    ),
    memory_bandwidth=300e9,
    memory_bytes=24 * 10**9,
    cache_bytes=99 * 1024,
    l2_bandwidth=58 * 16 * 2.04e9,
    exp_rate=58 * 16 * 2.04e9,
    cores=58,
    source="https://www.nvidia.com/en-us/data-center/l4/",
    call_overhead=_LAUNCH,
    modelled=_MODELLED,
)

RTX4090 = Device(
    name="rtx4090",
    kind="cuda",
    compute="sm_89",
    peak_flops=(
        ("float32", 82.6e12),
        ("tf32", 82.6e12),
        ("bfloat16", 165.2e12),
        ("float16", 165.2e12),
        ("float8", 330.3e12),
        ("int8", 660.6e12),
    ),
    memory_bandwidth=1008e9,
    memory_bytes=24 * 10**9,
    cache_bytes=99 * 1024,
    l2_bandwidth=128 * 16 * 2.52e9,
    exp_rate=128 * 16 * 2.52e9,
    cores=128,
    source="https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    call_overhead=_LAUNCH,
    modelled=_MODELLED,
    common=False,
)

_HOPPER = (
    ("float64", 66.9e12),
    ("float32", 66.9e12),
    ("tf32", 494.7e12),
    ("bfloat16", 989.4e12),
    ("float16", 989.4e12),
    ("float8", 1978.9e12),
    ("int8", 1978.9e12),
)

H100 = Device(
    name="h100",
    kind="cuda",
    compute="sm_90",
    peak_flops=_HOPPER,
    memory_bandwidth=3.35e12,
    memory_bytes=80 * 10**9,
    cache_bytes=227 * 1024,
    l2_bandwidth=132 * 32 * 1.83e9,
    exp_rate=132 * 16 * 1.83e9,
    cores=132,
    source="https://www.nvidia.com/en-us/data-center/h100/",
    call_overhead=_LAUNCH,
    modelled=_MODELLED,
    common=False,
)

H200 = Device(
    name="h200",
    kind="cuda",
    compute="sm_90",
    peak_flops=_HOPPER,
    memory_bandwidth=4.8e12,
    memory_bytes=141 * 10**9,
    cache_bytes=227 * 1024,
    l2_bandwidth=132 * 32 * 1.83e9,
    exp_rate=132 * 16 * 1.83e9,
    cores=132,
    source="https://www.nvidia.com/en-us/data-center/h200/",
    call_overhead=_LAUNCH,
    modelled=_MODELLED,
)

B200 = Device(  # one GPU of the HGX board at 1000 W
    name="b200",
    kind="cuda",
    compute="sm_100",
    peak_flops=(
        ("float64", 37e12),
        ("float32", 75e12),
        ("tf32", 1.1e15),
        ("bfloat16", 2.25e15),
        ("float16", 2.25e15),
        ("float8", 4.5e15),
        ("int8", 4.5e15),
        ("float4", 9e15),
    ),
    memory_bandwidth=8e12,
    memory_bytes=180 * 10**9,
    cache_bytes=227 * 1024,
    l2_bandwidth=148 * 32 * 1.855e9,
    exp_rate=148 * 16 * 1.855e9,
    cores=148,
    source="https://www.nvidia.com/en-us/data-center/hgx/",
    call_overhead=_LAUNCH,
    modelled=_MODELLED,
)

RTX5090 = Device(
    name="rtx5090",
    kind="cuda",
    compute="sm_120",
    peak_flops=(
        ("float32", 104.8e12),
        ("tf32", 104.8e12),
        ("bfloat16", 209.5e12),
        ("float16", 209.5e12),
        ("float8", 419e12),
        ("int8", 838e12),
        ("float4", 1676e12),
    ),
    memory_bandwidth=1792e9,
    memory_bytes=32 * 10**9,
    cache_bytes=99 * 1024,
    l2_bandwidth=170 * 16 * 2.407e9,
    exp_rate=170 * 16 * 2.407e9,
    cores=170,
    source="https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
    call_overhead=_LAUNCH,
    modelled=_MODELLED,
)

GB10 = Device(  # stated: 1 PFLOP/s FP4 with sparsity and 31 TFLOP/s FP32; the rates between are halved step by step
    name="gb10",
    kind="cuda",
    compute="sm_121",
    peak_flops=(
        ("float32", 31e12),
        ("tf32", 62.5e12),
        ("bfloat16", 125e12),
        ("float16", 125e12),
        ("float8", 250e12),
        ("int8", 250e12),
        ("float4", 500e12),
    ),
    memory_bandwidth=273e9,
    memory_bytes=128 * 10**9,
    cache_bytes=99 * 1024,
    l2_bandwidth=48 * 16 * 2.42e9,
    exp_rate=48 * 16 * 2.42e9,
    cores=48,
    source="https://www.nvidia.com/en-us/products/workstations/dgx-spark/",
    call_overhead=_LAUNCH,
    modelled=("peak_flops", *_MODELLED),
)

DEVICES = (T4, A100, A10, L4, RTX4090, H100, H200, B200, RTX5090, GB10)
