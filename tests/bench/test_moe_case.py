"""Run the case of mixture-of-experts blocks on its smallest row."""

from __future__ import annotations

import pytest

from bench.case import Row, Settings, Watch
from bench.cases.moe import MoE, build, distinct


@pytest.mark.parametrize(
    ("form", "tokens", "least", "most"), [("mixtral", 1, 2, 2), ("deepseek-v3", 1, 9, 9), ("qwen3-moe", 8, 5, 32)]
)
def test_experts_that_a_step_reads_are_counted(form: str, tokens: int, least: int, most: int) -> None:
    """The chosen ones, each once, and those that every token takes."""
    block, inputs = build(form, tokens, "float32", "cpu")
    assert least <= distinct(block, inputs) <= most


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
        assert arm["times_copy"] > 0
    trained = Row("64-pydoc-moe-float32", {"length": 64, "form": "pydoc-moe", "dtype": "float32"})
    (found,) = case.measure(trained, settings, Watch())
    assert all(arm["max_error"] < 1e-4 for arm in found["arms"].values())
    assert einsum.id == "256-gshard-float32"
    (found,) = case.measure(einsum, settings, Watch())
    timed = {name for name, arm in found["arms"].items() if "seconds" in arm}
    assert timed == {"eager", "loop-inductor", "eff"}
    assert all(found["arms"][name]["max_error"] < 1e-4 for name in timed)
