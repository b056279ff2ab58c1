"""Check seconds against hand arithmetic, and the fit against efficiencies that made the points."""

from __future__ import annotations

import json
import random

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from effcompile.core.errors import EffError
from effcompile.core.target import Device, Target
from effcompile.cost.roofline import ASSUMED, Efficiency, Fit, Measurement, bottleneck, fit, time
from effcompile.cost.symbolic import AttentionKind, AttentionShape, Cost, attention, elementwise, gemm, kv_decode
from effcompile.targets import devices

H200 = Target.parse("h200", devices()).device
IDEAL = Efficiency(overhead=0.0)
AMOUNTS = st.floats(1, 1e15)


def at(length: int, kind: AttentionKind = "flash", heads: int = 32) -> Cost:
    return attention(AttentionShape(B=1, Hq=heads, Hkv=8, Nq=length, Nk=length, D=128, Dv=128), kind)


@given(AMOUNTS, AMOUNTS, AMOUNTS, AMOUNTS, AMOUNTS)
def test_time_is_the_largest_term(flops: float, moved: float, exps: float, spilled: float, load: float) -> None:
    cost = Cost(flops, moved, exps, spill_bytes=spilled, load_bytes=load)
    terms = {
        "compute": flops / 989.4e12,
        "exp": exps / H200.exp_rate,
        "memory": (moved + spilled) / 4.8e12,
        "l2": load / H200.l2_bandwidth,
    }
    assert time(cost, H200, "bf16", IDEAL) == pytest.approx(max(terms.values()))
    assert terms[bottleneck(cost, H200, "bf16", IDEAL)] == max(terms.values())


def test_overhead_is_paid_per_call_and_sequences_add_up() -> None:
    nothing = Cost(calls=3)
    assert time(nothing, H200, "bf16", Efficiency(overhead=2e-6)) == pytest.approx(6e-6)
    assert time(nothing, H200, "bf16") == pytest.approx(3 * H200.call_overhead)
    parts = (at(1024), gemm(1024, 4096, 4096))
    assert time(parts, H200, "bf16") == pytest.approx(sum(time(part, H200, "bf16") for part in parts))
    assert time(parts[0] + parts[1], H200, "bf16", IDEAL) <= time(parts, H200, "bf16", IDEAL)


def test_symbols_stay_until_numbers_come() -> None:
    length = sympy.Symbol("S", positive=True, integer=True)
    shape = AttentionShape(B=1, Hq=32, Hkv=8, Nq=length, Nk=length, D=128, Dv=128)
    seconds = time(attention(shape), H200, "bf16")
    assert seconds.free_symbols == {length}
    for number in (1, 100, 5000):
        assert float(seconds.subs({length: number})) == pytest.approx(time(at(number), H200, "bf16"))
        assert isinstance(time(at(number), H200, "bf16"), float)


def test_known_bottlenecks() -> None:
    assert bottleneck(at(16384), H200, "bf16") == "compute"
    assert bottleneck(at(16384, "materialized"), H200, "bf16") == "memory"
    decode = kv_decode(AttentionShape(B=8, Hq=32, Hkv=8, Nq=1, Nk=32768, D=128, Dv=128))
    assert bottleneck(decode, H200, "bf16") == "memory"
    # Decoding needs the time that the cache takes to stream by.
    assert time(decode, H200, "bf16", IDEAL) == pytest.approx(2 * 2 * 8 * 32768 * 8 * 128 / 4.8e12, rel=1e-3)
    # Exponentials take half of the matrix time at head width 128, as published for Hopper.
    share = (at(16384).exps / H200.exp_rate) / (at(16384).flops / H200.peak("bf16"))
    assert float(share) == pytest.approx(0.5, abs=0.02)


@given(st.integers(1, 20_000), st.integers(1, 100))
def test_longer_is_never_faster(length: int, more: int) -> None:
    assert time(at(length + more), H200, "bf16") >= time(at(length), H200, "bf16")


def test_a_missing_unit_is_an_error() -> None:
    with pytest.raises(EffError, match="EFF-T103"):
        time(at(128), Target.parse("t4", devices()).device, "bf16")


def points(device: Device, truth: Efficiency, noise: float = 0.0, seed: int = 0) -> list[Measurement]:
    source = random.Random(seed)
    costs = [at(length, kind) for length in (128, 512, 2048, 8192, 32768) for kind in ("flash", "materialized")]
    costs += [elementwise(10**power) for power in range(3, 9)] + [elementwise(10**power, exps=64) for power in (6, 8)]
    costs += [Cost(load_bytes=10.0**power) for power in (8, 10, 11)]
    return [Measurement(c, time(c, device, "bf16", truth) * source.uniform(1 - noise, 1 + noise)) for c in costs]


@settings(max_examples=15, deadline=None)
@given(*(st.floats(0.2, 1.0) for _ in range(4)), st.floats(1e-7, 1e-4))
def test_the_fit_finds_what_made_the_points(
    compute: float, exp: float, memory: float, l2: float, overhead: float
) -> None:
    truth = Efficiency(compute, exp, memory, l2, overhead)
    found = fit(points(H200, truth), H200, "bf16")
    assert found.error < 0.02
    for point in points(H200, truth):
        assert time(point.cost, H200, "bf16", found.coefficients) == pytest.approx(point.seconds, rel=0.05)


def test_noise_shows_in_the_fit_error() -> None:
    truth = Efficiency(0.6, 0.5, 0.8, 0.7, 4e-6)
    quiet, noisy = (fit(points(H200, truth, noise), H200, "bf16") for noise in (0.02, 0.4))
    assert quiet.error < 0.03
    assert 0.05 < noisy.error < 0.4
    assert quiet.coefficients.memory == pytest.approx(0.8, rel=0.1)
    assert quiet.coefficients.overhead == pytest.approx(4e-6, rel=0.1)


def test_what_no_point_shows_is_named_and_kept() -> None:
    truth = Efficiency(compute=0.5, memory=0.9, overhead=1e-6)
    measured = [Measurement(gemm(n, n, n), time(gemm(n, n, n), H200, "bf16", truth)) for n in (64, 1024, 4096, 16384)]
    found = fit(measured, H200, "bf16")
    assert set(found.unseen) >= {"exp", "l2"}
    assert found.coefficients.exp == pytest.approx(ASSUMED.exp)
    assert found.coefficients.compute == pytest.approx(0.5, rel=1e-3)


def test_a_fit_survives_json_and_refuses_nonsense() -> None:
    found = fit(points(H200, Efficiency(0.6, 0.5, 0.8, 0.7, 4e-6), 0.1), H200, "bf16")
    assert Fit.from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(EffError, match="EFF-T104"):
        Fit.from_json({**found.to_json(), "eror": 1})
    with pytest.raises(EffError, match="EFF-T105"):
        fit([Measurement(at(128), 1.0)], H200, "bf16")
    with pytest.raises(EffError, match="EFF-T105"):
        fit([Measurement(at(128), 1.0), Measurement(at(256), 0.0)], H200, "bf16")
