"""Check the catalog against relations that hold between the rates of a chip and between chips."""

from __future__ import annotations

import pytest

from effcompile.core.target import Device, Target, element_bytes
from effcompile.targets import devices

CATALOG = devices()


def chip(name: str) -> Device:
    return Target.parse(name, CATALOG).device


def test_the_promised_targets_are_there() -> None:
    words = {device.compute for device in CATALOG}
    gpus = {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "sm_121", "gfx942", "gfx950"}
    assert gpus < words
    assert {"t4", "a100", "a10", "l4", "rtx4090", "h100", "h200", "b200", "rtx5090", "gb10"} < {d.name for d in CATALOG}


def test_names_are_unique_and_each_compute_word_has_one_common_chip() -> None:
    assert len({device.name for device in CATALOG}) == len(CATALOG)
    common = [device.compute for device in CATALOG if device.common]
    assert sorted(common) == sorted({device.compute for device in CATALOG})


@pytest.mark.parametrize("device", CATALOG, ids=lambda device: device.name)
def test_rates_of_a_device_agree_with_each_other(device: Device) -> None:
    assert device.source.startswith("https://")
    assert hash(device) == hash(device)
    assert device.l2_bandwidth > device.memory_bandwidth
    rates = dict(device.peak_flops)
    for narrow, wide in (("float8", "float16"), ("float16", "float32"), ("float4", "float8")):
        if narrow in rates and wide in rates:
            assert rates[narrow] >= rates[wide]
    # Halving the element at most doubles the rate of the matrix units (int8 against 32-bit accumulation: four times).
    if "float8" in rates:
        assert rates["float8"] <= 2.1 * rates["float16"]
    assert all(element_bytes(name) > 0 for name in rates)


def test_hopper_against_published_relations() -> None:
    h100, h200 = chip("h100"), chip("h200")
    assert h100.peak_flops == h200.peak_flops
    assert h200.intensity("bf16") == pytest.approx(206, abs=0.5)
    assert chip("b200").intensity("bf16") == pytest.approx(281, abs=0.5)
    assert h100.exp_rate == pytest.approx(3.9e12, rel=0.02)
    # Peak = SMs x 4096 FLOP per clock x the clock behind the exponential rate: the three figures fit together.
    assert h100.peak("bf16") == pytest.approx(h100.exp_rate / 16 * 4096, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "per_clock"),
    [("a100", 2048), ("l4", 1024), ("rtx4090", 512), ("b200", 8192), ("rtx5090", 512), ("mi300x", 2048), ("t4", 1024)],
)
def test_matrix_rates_are_a_whole_number_of_flop_per_clock_and_core(name: str, per_clock: int) -> None:
    device = chip(name)
    results_per_clock = 16 * device.cores
    clock = device.exp_rate / results_per_clock
    assert device.peak("float16") / (device.cores * clock) == pytest.approx(per_clock, rel=0.02)
