"""Check crossovers against a scan of every length."""

from __future__ import annotations

import json

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from effcompile.core.errors import EffError
from effcompile.core.target import Target
from effcompile.cost.crossover import Crossover, crossover, measured_crossover
from effcompile.cost.roofline import Efficiency, Work, time
from effcompile.cost.symbolic import AttentionShape, Cost, attention, selector
from effcompile.targets import devices

S = sympy.Symbol("S", positive=True, integer=True)
H200 = Target.parse("h200", devices()).device
FLOP_PER_SECOND = Efficiency(overhead=0.0)
SHAPE = AttentionShape(B=1, Hq=32, Hkv=8, Nq=S, Nk=S, D=128, Dv=128)
DENSE: Work = attention(SHAPE)


def curve(seconds: object) -> Cost:
    """Make a cost that takes the given seconds."""
    return Cost(flops=sympy.sympify(seconds) * H200.peak("bf16"))


def compare(a: object, b: object, lo: int, hi: int, **options: int) -> Crossover:
    ideal = {"efficiency_a": FLOP_PER_SECOND, "efficiency_b": FLOP_PER_SECOND}
    return crossover(curve(a), curve(b), S, lo, hi, H200, "bf16", **ideal, **options)  # type: ignore[arg-type]


def scan(a: object, b: object, lo: int, hi: int) -> list[int]:
    gain = sympy.lambdify(S, sympy.sympify(a) - sympy.sympify(b), modules="math")
    return [length for length in range(lo, hi + 1) if gain(length) > 0]


@given(st.integers(1, 3000), st.integers(10, 3000))
def test_a_single_crossing_is_exact(where: int, width: int) -> None:
    lo, hi = max(1, where - width), where + width
    found = compare(S, sympy.Rational(2 * where + 1, 2), lo, hi, samples=16)
    assert found.length == where + 1
    assert found.direction == "above"
    assert found.pays(where + 1)
    assert not found.pays(where)
    falling = compare(sympy.Rational(2 * where + 1, 2), S, lo, hi, samples=16)
    assert (falling.length, falling.direction, falling.intervals) == (None, "below", ((lo, where),))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(-40, 40), st.integers(1, 50), st.integers(60, 400))
def test_steps_equal_a_brute_force_scan(tile_a: int, tile_b: int, offset: int, lo: int, hi: int) -> None:
    a, b = tile_a * sympy.ceiling(S / tile_a) + 100, tile_b * sympy.ceiling(S / tile_b) + offset + 100
    found = compare(a, b, lo, hi)
    paying = scan(a, b, lo, hi)
    assert [length for length in range(lo, hi + 1) if found.pays(length)] == paying
    if not paying:
        assert (found.direction, found.length) == ("never", None)
    elif len(paying) == hi - lo + 1:
        assert (found.direction, found.length) == ("always", None)
    elif found.length is not None:
        assert paying[-1] == hi
        assert set(range(found.length, hi + 1)) <= set(paying)
        assert found.length - 1 not in paying
    else:
        assert hi not in paying


def test_several_crossings_are_told_and_not_hidden() -> None:
    a, b = (S - 100) * (S - 200) * (S - 300) + 10**8, sympy.Integer(10**8)
    found = compare(a, b, 1, 400)
    assert found.direction == "mixed"
    assert found.intervals == ((101, 199), (301, 400))
    assert found.length == 301
    assert found.text() == "b pays for S = 101..199, 301..400, throughout above 301 (modelled)"
    island = compare(a, b, 1, 250)
    assert (island.direction, island.length, island.intervals) == ("mixed", None, ((101, 199),))


def test_a_sparse_path_pays_where_the_scan_says() -> None:
    sparse = (selector(SHAPE, "antidiagonal"), attention(SHAPE, block_density=sympy.Rational(1, 10)))
    found = crossover(DENSE, sparse, S, 64, 131072, H200, "bf16", fit_error=0.18)
    gain = sympy.lambdify(S, time(DENSE, H200, "bf16") - time(sparse, H200, "bf16"), modules="math")
    first = next(length for length in range(64, 131073) if gain(length) > 0)
    assert found.length == first
    assert found.direction == "above"
    assert found.text("block path") == f"block path pays above S = {first:,} (modelled, +-18%)"


def test_a_slower_kernel_needs_less_density_to_break_even() -> None:
    slow = Efficiency(compute=0.7 * 0.65, exp=0.8, memory=0.85, l2=0.8)
    for density, pays in ((sympy.Rational(60, 100), True), (sympy.Rational(70, 100), False)):
        sparse = attention(SHAPE, block_density=density)
        found = crossover(DENSE, sparse, S, 16384, 65536, H200, "bf16", efficiency_b=slow)
        assert found.direction == ("always" if pays else "never")


def test_lines_of_text() -> None:
    assert compare(S, 0, 1, 10).text("flash") == "flash pays for all S = 1 to 10 (modelled)"
    assert compare(0, S, 1, 10).text("flash", "N") == "flash does not pay for N = 1 to 10 (modelled)"
    assert compare(5 + S / 100, S, 1, 10).text("flash") == "flash pays up to S = 5 only (modelled)"


@given(st.integers(200, 50_000), st.floats(1.2, 2.5))
def test_measured_points_give_the_crossing_of_two_power_laws(where: int, power: float) -> None:
    lengths = [2**exponent for exponent in range(6, 18)]
    slow, fast = [float(n) ** power for n in lengths], [float(where) ** (power - 1) * n for n in lengths]
    found = measured_crossover(lengths, slow, fast, error=0.04)
    assert found.direction == "above"
    assert found.length is not None
    assert abs(found.length - where) <= 1
    assert found.text().endswith("(measured, +-4%)")


def test_measured_points_must_be_points() -> None:
    for lengths, times in (([1], [1.0]), ([2, 1], [1.0, 1.0]), ([1, 2], [1.0])):
        with pytest.raises(EffError, match="EFF-T106"):
            measured_crossover(lengths, times, times)


def test_costs_of_other_symbols_and_empty_ranges_are_refused() -> None:
    other = sympy.Symbol("B", positive=True)
    with pytest.raises(EffError, match=r"EFF-T106.*B is free"):
        compare(S * other, S, 1, 10)
    with pytest.raises(EffError, match="EFF-T106"):
        compare(S, S, 10, 10)


@given(st.integers(2, 99))
def test_a_crossover_survives_json(where: int) -> None:
    found = compare(S, where, 1, 100)
    assert Crossover.from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(EffError, match="EFF-T104"):
        Crossover.from_json({**found.to_json(), "lenght": 1})
    with pytest.raises(EffError, match="EFF-T104"):
        Crossover.from_json({**found.to_json(), "direction": "up"})
