"""Run the case of mixture-of-experts blocks on its smallest row."""

from __future__ import annotations

import pytest

from bench.case import Row, Settings, Watch
from bench.cases.moe import MoE


@pytest.mark.slow
def test_a_row_compares_arms_that_agree() -> None:
    settings = Settings(quick=True, rounds=2, warmup=1, threads=1, dtypes=("float32",))
    case = MoE()
    row, einsum = case.rows(settings)
    assert row.id == "8-qwen3-moe-float32"
    (found,) = case.measure(row, settings, Watch())
    assert set(found["arms"]) == set(case.arms("cpu"))
    for arm in found["arms"].values():
        assert len(arm["seconds"]["samples"]) == 2
        assert arm["max_error"] < 1e-4
    trained = Row("64-pydoc-moe-float32", {"length": 64, "form": "pydoc-moe", "dtype": "float32"})
    (found,) = case.measure(trained, settings, Watch())
    assert all(arm["max_error"] < 1e-4 for arm in found["arms"].values())
    assert einsum.id == "256-gshard-float32"
    (found,) = case.measure(einsum, settings, Watch())
    timed = {name for name, arm in found["arms"].items() if "seconds" in arm}
    assert timed == {"eager", "loop-inductor", "eff"}
    assert all(found["arms"][name]["max_error"] < 1e-4 for name in timed)
