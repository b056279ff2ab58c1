"""Check detection on recorded answers of other machines, and calibration on this one."""

from __future__ import annotations

import json

import pytest
import torch

from effcompile.core.errors import EffError
from effcompile.core.target import Target
from effcompile.targets import cpu, devices
from effcompile.targets.detect import Calibration, calibrate_cpu, detect, detect_cpu, match_gpu, read_clock, read_isa

MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("compute", "name", "cores", "mib", "expected"),
    [
        ("sm_90", "NVIDIA H100 80GB HBM3", 132, 81559, "h100"),
        ("sm_90", "NVIDIA H200", 132, 143771, "h200"),
        ("sm_89", "NVIDIA GeForce RTX 4090", 128, 24564, "rtx4090"),
        ("sm_89", "NVIDIA L4", 58, 23034, "l4"),
        ("sm_80", "NVIDIA A100-SXM4-80GB", 108, 81920, "a100"),
        ("sm_75", "Tesla T4", 40, 15109, "t4"),
        ("sm_100", "NVIDIA B200", 148, 183359, "b200"),
    ],
)
def test_known_cards_are_the_catalog_device(compute: str, name: str, cores: int, mib: int, expected: str) -> None:
    device = match_gpu(compute, name, cores=cores, memory_bytes=mib * MIB)
    assert device.name == expected
    assert device in devices()


@pytest.mark.parametrize(
    ("compute", "name", "cores", "mib", "near"),
    [
        ("sm_89", "NVIDIA L40S", 142, 46068, "l4"),
        ("sm_90", "NVIDIA H100 PCIe", 114, 81559, "h100"),
        ("sm_90", "NVIDIA H200 MIG 3g.71gb", 60, 71000, "h200"),
        ("sm_80", "NVIDIA A100-PCIE-40GB", 108, 40960, "a100"),
        ("sm_87", "Orin", 16, 30000, "a10"),
    ],
)
def test_other_cards_are_scaled_by_cores_and_say_so(compute: str, name: str, cores: int, mib: int, near: str) -> None:
    device = match_gpu(compute, name, cores=cores, memory_bytes=mib * MIB)
    relative = Target.parse(near, devices()).device
    assert device not in devices()
    assert device.compute == compute
    assert device.memory_bytes == mib * MIB
    assert device.peak("float16") == pytest.approx(relative.peak("float16") * cores / relative.cores)
    assert {"peak_flops", "memory_bandwidth"} <= set(device.modelled)
    assert Target.parse(str(Target(device)), (*devices(), device)).device == device


def test_an_amd_card() -> None:
    device = match_gpu("gfx942", "AMD Instinct MI300X", cores=304, memory_bytes=192 * 1024**3, kind_is_rocm=True)
    assert device.name == "mi300x"


INTEL = (
    "vendor_id : GenuineIntel\ncpu family\t: 6\nflags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile\n"
)
ZEN4 = "vendor_id : AuthenticAMD\ncpu family\t: 25\nflags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16\n"
ZEN5 = ZEN4.replace("25", "26")


@pytest.mark.parametrize(
    ("cpuinfo", "capability", "machine", "isa"),
    [
        (INTEL, "AVX512", "x86_64", cpu.AMX),
        (ZEN4, "AVX512", "x86_64", cpu.AVX512_BF16_NARROW),
        (ZEN5, "AVX512", "x86_64", cpu.AVX512_BF16),
        (ZEN4, "AVX2", "x86_64", cpu.AVX2),  # ATEN_CPU_CAPABILITY holds torch back
        (INTEL.replace(" amx_bf16 amx_tile", ""), "AVX512", "x86_64", cpu.AVX512_BF16),
        ("flags\t: avx512f avx512_vnni\n", "AVX512", "x86_64", cpu.AVX512_VNNI),
        ("flags\t: avx512f\n", "AVX512", "x86_64", cpu.AVX512),
        ("", "DEFAULT", "x86_64", cpu.X86),
        ("Features\t: fp asimd\n", "DEFAULT", "aarch64", cpu.NEON),
        ("Features\t: fp asimd sve\n", "SVE256", "aarch64", cpu.SVE256),
    ],
)
def test_instruction_sets(cpuinfo: str, capability: str, machine: str, isa: cpu.Isa) -> None:
    assert read_isa(cpuinfo, capability, machine) is isa


def test_this_machine_is_a_modelled_cpu() -> None:
    target = detect()
    assert target == detect("cpu")
    assert detect("cpu") is detect("cpu")
    assert str(target) == "cpu"
    assert {"peak_flops", "memory_bandwidth", "exp_rate"} <= set(target.device.modelled)
    assert target.device.cores >= 1
    assert target.device.memory_bytes > 2**28


def test_the_nominal_clock() -> None:
    idle = "cpu MHz\t\t: 800.0\n"
    assert read_clock(f"model name\t: Intel(R) Xeon(R) CPU @ 2.60GHz\n{idle}") == 2.6e9
    assert read_clock(idle + "cpu MHz : 3100.5\n") == 3100.5e6
    assert read_clock(idle, "2400000\n") == 2.4e9
    assert read_clock("") > 1e9


def test_peaks_grow_with_cores_and_clock() -> None:
    one, many = cpu.model(cpu.AVX2, 1, 2e9), cpu.model(cpu.AVX2, 4, 3e9)
    assert many.peak("float32") == pytest.approx(6 * one.peak("float32"))
    assert cpu.model(cpu.AMX, 1, 2e9).peak("bf16") == 1024 * 2e9


def test_devices_that_are_not_here_are_errors() -> None:
    with pytest.raises(EffError, match="EFF-T107"):
        detect("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(EffError, match="EFF-T107"):
            detect("cuda")


def test_calibration_measures_applies_and_survives_json() -> None:
    found = calibrate_cpu(seconds=0.1)
    assert min(found.gemm_float32, found.gemm_bfloat16, found.memory_bandwidth, found.exp_rate, found.dispatch) > 0
    assert 0 < found.cpu_share <= 1
    assert found.threads == torch.get_num_threads()
    assert Calibration.from_json(json.loads(json.dumps(found.to_json()))) == found
    device = found.apply(detect_cpu())
    assert device.peak("float32") == found.gemm_float32
    assert device.peak("float64") == pytest.approx(found.gemm_float32 / 2)
    assert device.call_overhead == found.dispatch
    assert "memory_bandwidth" not in device.modelled
    assert "l2_bandwidth" in device.modelled
    with pytest.raises(EffError, match="EFF-T104"):
        Calibration.from_json({**found.to_json(), "gemm": 1})
