"""Check how a target is written, read and refused, and that a device is a plain value."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effcompile.core.errors import EffError
from effcompile.core.target import BACKENDS, DEFAULT_BACKEND, Device, Target, dtype_name, element_bytes
from effcompile.targets import devices

CHIPS = st.sampled_from(devices())
TARGETS = st.builds(Target, CHIPS, st.sampled_from(BACKENDS))


@given(TARGETS)
def test_the_written_form_reads_back_to_the_same_target(target: Target) -> None:
    assert Target.parse(str(target), devices()) == target


@given(TARGETS, st.booleans(), st.sampled_from(["", " ", "  "]))
def test_chip_names_case_and_blanks_are_accepted(target: Target, upper: bool, blank: str) -> None:
    text = f"{blank}{target.device.name}{blank}:{blank}{target.backend}"
    assert Target.parse(text.upper() if upper else text, devices()) == target


@pytest.mark.parametrize(
    ("text", "name", "written"),
    [
        ("sm_90", "h200", "sm_90"),
        ("h100", "h100", "h100"),
        ("sm_89", "l4", "sm_89"),
        ("RTX 4090", "rtx4090", "rtx4090"),
        ("sm_120:tensorrt-rtx", "rtx5090", "sm_120:tensorrt-rtx"),
        ("b200:inductor", "b200", "sm_100"),
        ("gfx942", "mi300x", "gfx942"),
        ("cpu", "cpu", "cpu"),
    ],
)
def test_words_pick_chips(text: str, name: str, written: str) -> None:
    target = Target.parse(text, devices())
    assert (target.device.name, str(target)) == (name, written)


def test_a_user_device_joins_like_a_built_in_one() -> None:
    mine = replace(devices()[0], name="npu7", compute="sm_87")
    assert Target.parse("npu7:onnx", (*devices(), mine)) == Target(mine, "onnx")
    assert Target.parse("sm_87", (*devices(), mine)).device is mine


@pytest.mark.parametrize(
    ("text", "near"), [("sm_91", "sm_90"), ("h20", "h200"), ("gfx940", "gfx942"), ("rtx4091", "4090")]
)
def test_an_unknown_device_names_its_near_matches(text: str, near: str) -> None:
    with pytest.raises(EffError) as caught:
        Target.parse(text, devices())
    assert caught.value.code == "EFF-T101"
    assert near in caught.value.message
    assert caught.value.hint == "eff targets"


@pytest.mark.parametrize("text", ["sm_90:", "sm_90:tensortr", "cpu:x:y"])
def test_an_unknown_backend_is_an_error(text: str) -> None:
    with pytest.raises(EffError, match="EFF-T102"):
        Target.parse(text, devices())


@given(st.text(max_size=12))
def test_any_other_text_is_refused_with_a_code(text: str) -> None:
    words = {word for device in devices() for word in (device.name, device.compute)}
    if text.partition(":")[0].strip().lower().replace(" ", "").replace("-", "") not in words:
        with pytest.raises(EffError, match=r"EFF-T10[12]"):
            Target.parse(text, devices())


@given(CHIPS)
def test_a_device_survives_json(device: Device) -> None:
    assert Device.from_json(json.loads(json.dumps(device.to_json()))) == device


def test_unknown_json_fields_are_refused() -> None:
    with pytest.raises(EffError, match=r"EFF-T104.*memory_bandwidth"):
        Device.from_json({**devices()[0].to_json(), "memory_bandwith": 1.0})


@pytest.mark.parametrize(
    "change",
    [{"kind": "tpu"}, {"name": "a:b"}, {"name": "H100"}, {"cores": 0}, {"peak_flops": ()}, {"modelled": ("speed",)}],
)
def test_an_impossible_device_cannot_be_built(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        replace(devices()[0], **change)  # type: ignore[arg-type]


def test_dtype_words() -> None:
    import torch

    words = {
        "bf16": "bfloat16",
        "fp16": "float16",
        "half": "float16",
        "fp8": "float8",
        "f32": "float32",
        "fp4": "float4",
    }
    assert {short: dtype_name(short) for short in words} == words
    assert dtype_name(torch.float8_e4m3fn) == "float8"
    assert dtype_name(torch.bfloat16) == "bfloat16"
    assert [element_bytes(word) for word in ("fp32", "bf16", "int8", "int4")] == [4, 2, 1, 0.5]
    with pytest.raises(EffError, match="EFF-T103"):
        dtype_name("float17")


def test_a_missing_unit_is_an_error_that_lists_the_others() -> None:
    t4 = Target.parse("t4", devices()).device
    assert not t4.supports("bf16")
    with pytest.raises(EffError, match=r"EFF-T103.*bfloat16.*float16"):
        t4.peak("bf16")


def test_the_default_backend_is_one_of_the_backends() -> None:
    assert DEFAULT_BACKEND in BACKENDS
