"""Check medians, spreads and ratios taken round by round."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.stats import Spread, ratio, ratios

times = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=15)


@given(times)
def test_spread_agrees_with_its_definition(samples: list[float]) -> None:
    spread = Spread(tuple(samples))
    assert spread.median == statistics.median(samples)
    assert 0 <= spread.iqr <= max(samples) - min(samples) + 1e-9


def test_quartiles_of_a_known_list() -> None:
    assert Spread((1.0, 2.0, 3.0, 4.0, 5.0)).iqr == 2.0
    assert Spread((7.0,)).iqr == 0.0
    found = Spread((3.0, 1.0, 2.0)).to_json()
    assert found == {"median": 2.0, "min": 1.0, "max": 3.0, "iqr": 1.0, "samples": [3.0, 1.0, 2.0]}


def test_a_spread_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Spread(())


def test_ratios_pair_rounds_before_the_median() -> None:
    # The machine slows down threefold after the first round: each round still says 2, the ratio of medians would too,
    # and a pairing across rounds would not.
    eager, arm = Spread((2.0, 6.0, 6.0)), Spread((1.0, 3.0, 3.0))
    assert ratio(eager, arm).samples == (2.0, 2.0, 2.0)
    # Here the ratio of the medians is 1, but the arm won two rounds of three.
    assert ratio(Spread((2.0, 4.0, 10.0)), Spread((1.0, 2.0, 40.0))).median == 2.0


def test_ratios_need_the_same_rounds() -> None:
    with pytest.raises(ValueError, match="same rounds"):
        ratio(Spread((1.0,)), Spread((1.0, 2.0)))


def test_ratios_name_every_pair_once() -> None:
    spreads = {"eager": Spread((4.0,)), "inductor": Spread((2.0,)), "eff": Spread((1.0,))}
    found = {(item["arm"], item["to"]): item["median"] for item in ratios(spreads, ["eager"], ["eff"])}
    assert found == {("inductor", "eager"): 2.0, ("eff", "eager"): 4.0, ("eff", "inductor"): 2.0}
    assert len(ratios(spreads, ["eager"], ["eff"])) == 3
    assert ratios(spreads, ["absent"], []) == []
