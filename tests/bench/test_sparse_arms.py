"""Check the arms of the attention table that policies need, and that the planner reads their curves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.case import Settings, Watch
from bench.cases.attention_table import SPARSE, AttentionTable
from bench.condense import condense
from effcompile import ops
from effcompile.compiler import catalog
from effcompile.core.mask import CAUSAL
from effcompile.core.policy import Estimate
from effcompile.core.site import AttentionSite
from effcompile.core.target import Target
from effcompile.lowering.attention import estimate
from effcompile.lowering.rates import read
from effcompile.passes.attention.xattention import XAttention
from effcompile.targets import cpu

ZEN4 = Target(cpu.model(cpu.AVX512_BF16_NARROW, cores=2, clock=2.6e9, vendor="amd"))
SITE = AttentionSite("a", "attention", "f", "", "sdpa", 2, 9, 3, q_len=700, kv_len=700, mask=CAUSAL, scale=0.125)


def rows(mask: str, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    case = AttentionTable(other_head_dims=(), dtypes=("float32",))
    settings = Settings(lengths=lengths, forms=(mask,), rounds=1, warmup=0, threads=1, arms=("dense", *SPARSE))
    return [case.measure(row, settings, Watch())[0] for row in case.rows(settings)]


def evened(row: dict[str, Any]) -> dict[str, Any]:
    """Return a measured row whose arms all ran at half of one GEMM rate, for single rounds say little of which is faster."""
    arms = {}
    for name, arm in row["arms"].items():
        if "seconds" in arm:
            flops = arm["gflops"] * 1e9 * arm["seconds"]["median"]
            arm = {**arm, "seconds": {**arm["seconds"], "median": flops / 5e10}, "share_of_gemm": 0.5}
        arms[name] = arm
    return {**row, "gemm_gflops": 100.0, "arms": arms}


@pytest.mark.parametrize("mask", ["causal", "decode-mask", "window"])
def test_each_arm_runs_where_it_means_something(mask: str) -> None:
    ops.register()
    (row,) = rows(mask, (512,))
    arms = row["arms"]
    assert isinstance(arms, dict)
    assert not [name for name, arm in arms.items() if "error" in arm]
    ran = {name for name, arm in arms.items() if "seconds" in arm} - {"dense"}
    if mask == "window":
        assert not ran
        return
    assert ran >= {"blocks-0.1", "blocks-0.3", "blocks-1.0", "choose-block-topk"}
    assert ("choose-quest" in ran) == (mask == "decode-mask")
    assert ("choose-zipvl" in ran) == ("choose-xattention" in ran) == (mask == "causal")
    assert arms["blocks-1.0"]["max_error"] < 1e-4, "the whole map is dense attention"
    assert arms["blocks-0.1"]["visited"] < arms["blocks-0.3"]["visited"] < arms["blocks-1.0"]["visited"]


def test_the_planner_reads_what_the_arms_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between measured densities and lengths the price lies between theirs, and a policy's price is measured in both parts."""
    ops.register()
    document = {"rows": [evened(row) for row in rows("causal", (512, 1024))]}
    about = {"about": "", **condense(document, {"float32": ZEN4.device.peak("float32")})}
    rates = read("amd-x86-64-avx512+bf16", about)
    for name in ("rates_of", "nearest_rates"):
        monkeypatch.setattr(estimate, name, lambda device: rates)
    found = [estimate.price_blocks(SITE, ZEN4, kept) for kept in (0.1, 0.2, 0.3, 0.7, 1.0)]
    assert {answer.tag for answer in found} == {"measured"}
    assert found[0].seconds < found[1].seconds < found[2].seconds < found[4].seconds
    assert estimate.price_blocks(SITE, ZEN4, 0.05).tag == "modelled", "a density below the measured ones"
    assert estimate.price_blocks(replace(SITE, kv_len=4096, q_len=4096), ZEN4, 0.2).tag == "modelled"
    choice = estimate.price_choice("xattention", SITE, ZEN4, XAttention().search(SITE))
    assert choice is not None
    assert choice.tag == "measured"
    proposal = XAttention().propose(SITE, ZEN4, catalog())
    assert isinstance(proposal, Estimate)
    assert proposal.tag == "measured"
    assert proposal.seconds == pytest.approx(
        choice.seconds + estimate.price_blocks(SITE, ZEN4, proposal.density).seconds
    )
    assert estimate.price_choice("xattention", replace(SITE, head_dim=128, value_dim=128), ZEN4, 1e9).tag == "modelled"  # type: ignore[union-attr]
    assert estimate.price_choice("unknown", SITE, ZEN4, 1e9) is None
