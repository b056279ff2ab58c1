"""Check the lookup in the table of rates, and that what is called measured was measured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effcompile.core.expr import BATCH, BOOL, KEY, QUERY, apply, axis, const, load
from effcompile.core.mask import CAUSAL, Mask, Opaque
from effcompile.core.site import AttentionSite
from effcompile.core.target import Target
from effcompile.lowering.attention import estimate
from effcompile.lowering.rates import Curve, power_law, rates_of, table
from effcompile.targets import cpu, devices

ZEN4 = Target(cpu.model(cpu.AVX512_BF16_NARROW, cores=2, clock=2.6e9, vendor="amd"))
OTHER = Target(cpu.model(cpu.NEON, cores=4, clock=2.6e9))
SITE = AttentionSite("a", "attention", "f", "", "sdpa", 2, 9, 3, q_len=1024, kv_len=1024, mask=CAUSAL)


@given(st.lists(st.floats(0.01, 2.0), min_size=2, max_size=5), st.floats(1.0, 1e6))
def test_a_power_law_goes_through_its_points_and_stays_between_them(values: list[float], at: float) -> None:
    places = [32 * 4**n for n in range(len(values))]
    for place, value in zip(places, values):
        assert power_law(places, values, place) == pytest.approx(value)
    found = power_law(places, values, at)
    assert min(values) * 0.999 <= found <= max(values) * 1.001
    if places[0] < at < places[1]:
        share = math.log(at / places[0]) / math.log(4)
        assert found == pytest.approx(values[0] ** (1 - share) * values[1] ** share)


def test_the_installed_table_is_sound() -> None:
    assert table()
    for rates in table().values():
        assert rates.about
        assert all(0.05 < share < 2 for share in rates.gemm.values())
        for key, curve in rates.curves.items():
            assert list(curve.lengths) == sorted(set(curve.lengths)), key
            assert len(curve.lengths) == len(curve.shares)
            assert len(curve.head_dims) == len(curve.factors)
            assert all(0 < share < 3 for share in curve.shares), key
            assert 0 <= curve.call < 1e-2, key
            assert 0 <= curve.error < 1, key
            assert Curve.from_json(curve.to_json()) == curve


def test_a_covered_site_is_measured_with_its_error() -> None:
    answer = estimate.price("sdpa-causal", SITE, ZEN4, 0.5)
    assert answer.tag == "measured"
    assert answer.error is not None
    rates = rates_of(ZEN4.device)
    assert rates is not None
    curve = rates.curve("sdpa-causal", "float32", "causal")
    assert curve is not None
    work = 4 * 2 * 9 * 1024**2 * 64 * 0.5 / (ZEN4.device.peak("float32") * rates.gemm["float32"])
    assert answer.seconds == pytest.approx(curve.call + work / curve.share(1024, 64))


PADDING = load(0, (axis(BATCH), axis(KEY)), BOOL)
WINDOW = apply("gt", axis(KEY), apply("sub", axis(QUERY), const(256)))
PREFIX = apply("or", CAUSAL.keep, apply("lt", axis(KEY), const(100)))


@pytest.mark.parametrize(
    ("changes", "target"),
    [
        ({}, OTHER),
        ({"dtype": "float16"}, ZEN4),
        ({"dtype": "float64"}, ZEN4),
        ({"q_len": 1 << 15, "kv_len": 1 << 15}, ZEN4),
        ({"q_len": 8, "kv_len": 8}, ZEN4),
        ({"head_dim": 256, "value_dim": 256}, ZEN4),
        ({"value_dim": 32}, ZEN4),
        ({"kv_len": 2048}, ZEN4),
        ({"q_len": "s", "kv_len": "s"}, ZEN4),
        ({"mask": Mask(keep=PREFIX)}, ZEN4),
        ({"mask": Mask(keep=CAUSAL.keep, bias=const(1.0))}, ZEN4),
    ],
)
def test_what_the_table_does_not_cover_is_modelled(changes: dict[str, object], target: Target) -> None:
    answer = estimate.price("blocked", replace(SITE, **changes), target, 0.5)  # type: ignore[arg-type]
    assert (answer.tag, answer.error) == ("modelled", None)
    assert answer.seconds > 0


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (Mask(), "full"),
        (CAUSAL, "causal"),
        (Mask(keep=apply("and", CAUSAL.keep, WINDOW)), "window"),
        (Mask(keep=PADDING), "padding"),
        (Mask(keep=apply("and", CAUSAL.keep, PADDING)), "causal-padding"),
        (Mask(keep=PREFIX), None),
        (Opaque("no reason"), "causal"),
    ],
)
def test_the_form_of_a_mask(mask: Mask | Opaque, name: str | None) -> None:
    assert estimate.form(replace(SITE, mask=mask)) == name
    assert estimate.form(replace(SITE, mask=mask, q_len=1)) == ("decode" if mask == Mask() else "decode-mask")


def test_a_gpu_is_modelled() -> None:
    for word in ("h100", "sm_89"):
        target = Target.parse(word, devices())
        assert estimate.price("flex", SITE, target, 0.5).tag == "modelled"


@given(st.integers(16, 8192), st.sampled_from(["float32", "bfloat16"]), st.sampled_from([16, 32, 64, 96, 128, 256]))
def test_more_work_takes_longer(length: int, dtype: str, head_dim: int) -> None:
    site = replace(SITE, q_len=length, kv_len=length, dtype=dtype, head_dim=head_dim, value_dim=head_dim)
    for kind in ("dense", "sdpa-causal", "blocked", "flex", "padded", "math"):
        small = estimate.seconds(kind, site, ZEN4, 0.5)
        assert estimate.seconds(kind, replace(site, batch=4), ZEN4, 0.5) > small
        assert estimate.seconds(kind, site, ZEN4, 1.0) > small
