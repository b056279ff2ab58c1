"""Check the bounds on memory traffic at their limits and against a count of a simulated loop."""

from __future__ import annotations

import math

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from effcompile.core.target import Target
from effcompile.cost import io_bounds
from effcompile.targets import devices

N, D, M = sympy.symbols("N d M", positive=True)
SIZES = st.tuples(st.integers(64, 100_000), st.integers(8, 512), st.integers(64, 10**6))


def test_both_orders_meet_at_m_equal_d_squared() -> None:
    at = {M: D**2}
    square, flash = io_bounds.square_order(N, D, M).subs(at), io_bounds.flash_order(N, D, M).subs(at)
    assert sympy.simplify(square - flash) == 0
    assert sympy.simplify(flash - N**2) == 0
    assert io_bounds.optimal(4096, 128, 128**2) == 4096**2


@given(SIZES)
def test_the_better_order_changes_at_d_squared_only(sizes: tuple[int, int, int]) -> None:
    n, d, m = sizes
    flash_wins = io_bounds.flash_order(n, d, m) <= io_bounds.square_order(n, d, m)
    assert bool(flash_wins) == (m >= d * d)


@pytest.mark.parametrize(("n", "d"), [(1024, 64), (4096, 128), (65536, 32)])
def test_a_memory_that_holds_the_input_makes_traffic_linear(n: int, d: int) -> None:
    assert io_bounds.optimal(n, d, n * d) == n * d
    assert io_bounds.flash2(n, d, n * d) <= 10 * n * d
    assert io_bounds.flash2(n, d, 4 * n * d) == 4 * n * d  # q, k, v and the output once each


@given(SIZES, st.integers(2, 4))
def test_monotone_in_memory_length_and_width(sizes: tuple[int, int, int], factor: int) -> None:
    n, d, m = sizes
    for bound in (io_bounds.optimal, io_bounds.flash1, io_bounds.flash2, io_bounds.square_tiling):
        here = float(bound(n, d, m))
        assert float(bound(n, d, m * factor)) <= here
        assert float(bound(n * factor, d, m)) > here
        assert float(bound(n, d * factor, m)) > here


@given(SIZES)
def test_every_algorithm_is_above_the_optimal_order(sizes: tuple[int, int, int]) -> None:
    n, d, m = sizes
    least = float(io_bounds.optimal(n, d, m))
    for algorithm in (io_bounds.flash1, io_bounds.flash2, io_bounds.square_tiling):
        assert float(algorithm(n, d, m)) >= least


@given(st.integers(1, 300), st.integers(1, 16), st.integers(4, 4096))
def test_flash2_equals_a_counted_loop(n: int, d: int, m: int) -> None:
    rows = max(1, m // (4 * d))
    moved = 0
    for start in range(0, n, rows):
        tile = min(rows, n - start)
        moved += 2 * tile * d  # the tile of q in, of the output out
        moved += 2 * n * d  # k and v streamed past it
    assert io_bounds.flash2(n, d, m) == moved


def test_flash2_is_near_its_smooth_form() -> None:
    n, d, m = 2**17, 128, 116_000
    assert float(io_bounds.flash2(n, d, m)) == pytest.approx(2 * n * d + 8 * n**2 * d**2 / m, rel=0.01)


def test_hopper_leaves_the_flash_regime_between_256_and_512() -> None:
    h200 = Target.parse("h200", devices()).device
    assert math.isqrt(h200.cache_bytes // 2) == 340
    assert [io_bounds.regime(d, h200, "bf16") for d in (64, 256, 340, 341, 512)] == [
        "flash",
        "flash",
        "flash",
        "square-tiling",
        "square-tiling",
    ]


def test_bounds_stay_symbolic() -> None:
    assert io_bounds.optimal(N, D, M).free_symbols == {N, D, M}
    assert io_bounds.optimal(N, D, M).subs({N: 4096, D: 128, M: 128**2}) == 4096**2
