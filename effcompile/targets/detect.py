"""Ask this machine what it is, and measure what its CPU really does.

The only device queries of the package are here, but for `core/processor.py`, which keeps the compiled code of one processor from
another. A GPU is looked up in the catalog by capability and name; one that is not in it is scaled from its nearest relative by its
number of cores and says so in `Device.modelled`.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from effcompile.core.errors import EffError, unknown
from effcompile.core.processor import cpuinfo
from effcompile.core.target import Device, Target
from effcompile.targets import cpu, devices

_DEFAULT_CLOCK = 2.5e9


@cache
def detect(device_type: str = "cpu") -> Target:
    """Return the target of this machine for a torch device type (`cpu`, `cuda`; ROCm builds of torch say `cuda` too).

    Raises `EFF-T107` where torch sees no such device.
    """
    if device_type == "cpu":
        return Target(detect_cpu())
    if device_type != "cuda":
        raise unknown("EFF-T107", "device type", device_type, ("cpu", "cuda"))
    import torch

    if not torch.cuda.is_available():
        raise EffError(
            "EFF-T107", "torch sees no GPU here", hint="name a target instead, for example sm_90, or use cpu"
        )
    properties = torch.cuda.get_device_properties(0)
    if torch.version.hip:
        compute = str(properties.gcnArchName).partition(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(0)
        compute = f"sm_{major}{minor}"
    return Target(
        match_gpu(
            compute,
            str(properties.name),
            cores=int(properties.multi_processor_count),
            memory_bytes=int(properties.total_memory),
            kind_is_rocm=bool(torch.version.hip),
        )
    )


def match_gpu(compute: str, name: str, *, cores: int, memory_bytes: int, kind_is_rocm: bool = False) -> Device:
    """Return the catalog's device for a GPU that reports these values, or one scaled from its nearest relative.

    A chip is the catalog's only if the name, the number of cores and the memory all agree: cards of one name differ
    (H100 PCIe, A100 40 GB, a slice of a partitioned GPU).
    """
    kind = "rocm" if kind_is_rocm else "cuda"
    family = [device for device in devices() if device.kind == kind]
    same = [device for device in family if device.compute == compute]
    parts = re.findall(r"[a-z0-9]+", name.lower())
    words = {*parts, *(left + right for left, right in pairwise(parts))}
    named = [device for device in same if device.name in words]
    if named and named[0].cores == cores and 0.85 < memory_bytes / named[0].memory_bytes < 1.15:
        return named[0]
    common = [device for device in same if device.common]
    nearest = sorted(family, key=lambda device: (abs(_number(device.compute) - _number(compute)), not device.common))
    near = (*named, *common, *nearest)[0]
    scale = cores / near.cores
    return replace(
        near,
        name="-".join(parts) or compute,
        compute=compute,
        peak_flops=tuple((dtype, rate * scale) for dtype, rate in near.peak_flops),
        memory_bandwidth=near.memory_bandwidth * scale,
        memory_bytes=memory_bytes,
        l2_bandwidth=near.l2_bandwidth * scale,
        exp_rate=near.exp_rate * scale,
        cores=cores,
        modelled=("peak_flops", "memory_bandwidth", "cache_bytes", "l2_bandwidth", "exp_rate", "call_overhead"),
        common=False,
    )


def _number(compute: str) -> int:
    # gfx90a is older than gfx942: the last digits of an AMD word are hexadecimal.
    digits = re.sub(r"^(sm_|gfx)", "", compute)
    return int(digits, 16 if compute.startswith("gfx") else 10)


@cache
def detect_cpu() -> Device:
    """Return this machine's CPU, its rates modelled from the instruction set, the usable cores and the clock."""
    import torch

    text = cpuinfo()
    return cpu.model(
        read_isa(text, str(torch.backends.cpu.get_cpu_capability()), platform.machine()),
        cores=_usable_cores(),
        clock=read_clock(text, _read("/sys/devices/system/cpu/cpu0/cpufreq/base_frequency")),
        memory_bytes=_memory_bytes(),
        cache_bytes=_private_cache_bytes(),
        vendor=read_vendor(text),
    )


def read_vendor(cpuinfo: str) -> str:
    """Return the maker of the CPU from /proc/cpuinfo in one lower-case word, or '' where it is not told."""
    found = re.search(r"^(?:vendor_id|CPU implementer)\s*:\s*(\S+)", cpuinfo, re.MULTILINE)
    word = found[1] if found else ""
    known = {"AuthenticAMD": "amd", "GenuineIntel": "intel", "0x41": "arm", "0xc0": "ampere", "0x61": "apple"}
    return known.get(word, re.sub(r"[^a-z0-9]", "", word.lower()))


def read_isa(cpuinfo: str, capability: str, machine: str) -> cpu.Isa:
    """Return the instruction set that torch uses, from /proc/cpuinfo, torch's own word and the machine's name."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    if machine.lower() in ("aarch64", "arm64"):
        return cpu.SVE256 if "SVE" in capability.upper() else cpu.NEON
    if "AVX512" in capability.upper():
        if "amx_bf16" in flags:
            return cpu.AMX
        if "avx512_bf16" in flags:
            narrow = "AuthenticAMD" in cpuinfo and re.search(r"^cpu family\s*:\s*25$", cpuinfo, re.MULTILINE)
            return cpu.AVX512_BF16_NARROW if narrow else cpu.AVX512_BF16
        return cpu.AVX512_VNNI if "avx512_vnni" in flags else cpu.AVX512
    return cpu.AVX2 if "AVX2" in capability.upper() else cpu.X86


def read_clock(cpuinfo: str, base_khz: str = "") -> float:
    """Return the nominal clock in Hz: the base frequency, else that of the model name, else the fastest core now."""
    if base_khz.strip().isdigit():
        return float(base_khz) * 1e3
    named = re.search(r"^model name.*@\s*([\d.]+)\s*GHz", cpuinfo, re.MULTILINE)
    if named:
        return float(named[1]) * 1e9
    # An idle core reports a lowered clock, so one core alone says little.
    return max(
        (float(mhz) * 1e6 for mhz in re.findall(r"(?m)^cpu MHz\s*:\s*([\d.]+)", cpuinfo)), default=_DEFAULT_CLOCK
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _usable_cores() -> int:
    """Return the cores this process may use: its affinity, cut by the quota of a container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def _memory_bytes() -> int:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 16 * 10**9


def free_memory(device_type: str) -> int | None:
    """Return the bytes that a device of this machine has left for new tensors, None where nobody says."""
    if device_type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if device_type == "cpu" and found else None


def _private_cache_bytes() -> int:
    size = _read("/sys/devices/system/cpu/cpu0/cache/index2/size").strip()
    return int(size[:-1]) * 1024 if size.endswith("K") and size[:-1].isdigit() else 1024 * 1024


@dataclass(frozen=True)
class Calibration:
    """Hold what this CPU did: FLOP/s of a GEMM, bytes/s of a copy, exponentials/s, seconds per dispatched op.

    `cpu_share` is the part of its time that the measurement got on the cores: near 1 on an idle machine; well below,
    other work took the cores and the rates are too low.
    """

    gemm_float32: float
    gemm_bfloat16: float
    memory_bandwidth: float
    exp_rate: float
    dispatch: float
    cpu_share: float
    threads: int
    torch: str

    def apply(self, device: Device) -> Device:
        """Return `device` with the measured rates; those of other dtypes are scaled as float32's came out."""
        measured = {"float32": self.gemm_float32, "bfloat16": self.gemm_bfloat16}
        scale = self.gemm_float32 / device.peak("float32")
        return replace(
            device,
            peak_flops=tuple((dtype, measured.get(dtype, rate * scale)) for dtype, rate in device.peak_flops),
            memory_bandwidth=self.memory_bandwidth,
            exp_rate=self.exp_rate,
            call_overhead=self.dispatch,
            source=f"measured with torch {self.torch} on {self.threads} threads",
            # The other dtypes of peak_flops and the cache bandwidth still rest on the model.
            modelled=tuple(name for name in device.modelled if name in ("peak_flops", "l2_bandwidth")),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Calibration:
        """Build a calibration from `to_json`'s value; an unknown field is `EFF-T104`."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                raise unknown("EFF-T104", "field of a calibration", key, known)
        return cls(**data)


def calibrate_cpu(seconds: float = 1.0) -> Calibration:
    """Measure this CPU with torch's present thread count, in about `seconds` altogether.

    Best of the repetitions that fit: the rates are ceilings for a roofline, and noise only ever slows a run down.
    """
    import torch

    share = seconds / 5
    start, cpu_start = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        size, elements = 768, 1 << 24
        rates = {}
        for dtype in (torch.float32, torch.bfloat16):
            left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
            out = torch.empty(size, size, dtype=dtype)
            rates[dtype] = 2 * size**3 / _best(lambda: torch.mm(left, right, out=out), share)  # noqa: B023
        on_core = (time.process_time() - cpu_start) / (time.perf_counter() - start) / torch.get_num_threads()
        source = torch.ones(elements)
        target = torch.empty(elements)
        copied = 2 * 4 * elements / _best(lambda: target.copy_(source), share)
        # Small enough for the private caches of the cores, large enough that waking the threads is forgotten.
        scores = torch.zeros(torch.get_num_threads() << 17)
        weights = torch.empty_like(scores)
        exps = scores.numel() / _best(lambda: torch.exp(scores, out=weights), share)
        scalar = torch.zeros(1)

        def hundred() -> None:
            for _ in range(100):
                scalar.add_(1.0)

        dispatch = _best(hundred, share) / 100
    return Calibration(
        gemm_float32=rates[torch.float32],
        gemm_bfloat16=rates[torch.bfloat16],
        memory_bandwidth=copied,
        exp_rate=exps,
        dispatch=dispatch,
        cpu_share=min(1.0, on_core),
        threads=int(torch.get_num_threads()),
        torch=str(torch.__version__),
    )


def _best(run: Callable[[], object], budget: float) -> float:
    """Return the shortest of the runs that fit into `budget` seconds, after one that warms up."""
    run()
    best, end = float("inf"), time.perf_counter() + budget
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best
