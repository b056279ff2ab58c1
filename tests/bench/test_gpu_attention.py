"""Check on the CPU what the case gpu-attention does beside timing: its exact rows, its maps, its rule, its time limit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu_arms, gpu_problems, store
from bench.case import Settings, Watch
from bench.cases.gpu_attention import GpuAttention, take_turns
from bench.exact import banded, sample
from bench.manifest import manifest
from effcompile import ops
from effcompile.ops import block_sparse, flash
from tests.support.attention import draw

CPU = Settings(device="cpu", rounds=2, warmup=1, threads=1)
TINY = GpuAttention(
    lengths=(300,), densities=(0.4,), head_dims=(), budgets=(64,), heads=4, kv_heads=2, head_dim=16, sequences=2
)


def qkv(rows: int = 40, keys: int = 50, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Draw operands with grouped heads."""
    return draw((2, 4, rows, 16), dtype), draw((2, 2, keys, 16), dtype, 1), draw((2, 2, keys, 16), dtype, 2)


def test_sampled_rows_are_rows_of_the_whole() -> None:
    q, k, v = qkv()
    found = sample(q, k, v, banded(40, 50, 0, 7), 0.3)
    out, lse = flash.flash(q.double(), k.double(), v.double(), None, None, 7, 0, 10, 0.3, 0.0)
    b, h, i = found.places.unbind(1)
    torch.testing.assert_close(found.out, out[b, h, i])
    torch.testing.assert_close(found.lse, lse[b, h, i])
    assert {39, 38} <= set(i[:32].tolist())
    assert len(set(zip(b.tolist(), h.tolist()))) == 8


def test_the_rule_passes_the_plain_way_and_nothing_worse() -> None:
    q, k, v = qkv()
    found = sample(q, k, v, banded(40, 50, 0), 0.3)
    exact = flash.flash(q.double(), k.double(), v.double(), None, None, -1, 0, 10, 0.3, 0.0)
    assert found.numerics(exact[0].to(torch.bfloat16))["within"]
    assert found.lse_error(exact[1]) < 1e-12
    off = flash.flash(q.double(), k.double(), v.double(), None, None, -1, 1, 10, 0.3, 0.0)
    assert not found.numerics(off[0].to(torch.bfloat16))["within"], "one key too many"
    assert found.lse_error(off[1]) > 1e-3
    broken = exact[0].clone()
    broken[..., 0] = math.nan
    assert not found.numerics(broken)["within"]
    assert found.lse_error(torch.full_like(exact[1], -math.inf)) == math.inf


@pytest.mark.parametrize("density", [1.0, 0.5, 0.2])
def test_maps_have_the_density_and_stay_causal(density: float) -> None:
    partial, full = gpu_problems.causal_map(40, density, 3, "cpu")
    assert gpu_problems.density_of(partial, full) == pytest.approx(density, abs=0.01)
    assert not (partial & full).any()
    assert not full.triu().any()
    assert (partial | full)[..., 0].all()
    assert torch.equal(partial[0, 0], torch.eye(40, dtype=torch.bool))


def test_a_map_and_its_keep_say_the_same() -> None:
    partial, full = gpu_problems.causal_map(5, 0.4, 3, "cpu")
    partial, full = partial[..., :5, :5], full[..., :5, :5]
    keep = gpu_problems.map_keep(partial, full, 8, 37)
    every = torch.arange(37)
    for head in range(3):
        got = keep(torch.zeros_like(every), torch.full_like(every, head), every)
        band = flash.band(1, 37, 37, None, None, -1, 0, 0, torch.device("cpu"))[0, 0]
        one = slice(head, head + 1)
        some, whole = (block_sparse.spread(x[:, one], 1, 37, 37, 8, 8)[0, 0] for x in (partial, full))
        assert torch.equal(got, (some & band) | whole)


def test_operands_rotate() -> None:
    sets = gpu_arms.operand_sets(lambda seed: (torch.full((1024, 1024), seed),))
    assert len(sets) == 8
    seen = []
    call = gpu_arms.Rotating(lambda x: seen.append(int(x[0, 0])), sets[:3])
    for _ in range(4):
        call()
    assert seen == [0, 1, 2, 0]


@pytest.mark.parametrize("form", ["dense", "sparse", "decode", "scores", "int8"])
def test_every_kind_of_row_runs_on_the_reference_bodies(form: str) -> None:
    settings = replace(CPU, forms=(form,))
    (row,) = TINY.rows(settings)
    (result,) = TINY.measure(row, settings, Watch())
    mine = {name: arm for name, arm in result["arms"].items() if name.startswith("eff")}
    assert mine
    for name, arm in mine.items():
        assert arm["numerics"]["within"], (name, arm)
        assert arm["seconds"]["median"] > 0
    document = store.merge(store.empty("gpu-attention", "t", "a", "call", "cpu", "chip"), manifest(CPU), [result])
    assert store.check(document) == []


def test_an_arm_that_is_wrong_is_not_timed() -> None:
    ops.register()
    (row,) = TINY.rows(replace(CPU, forms=("dense",)))
    problem = TINY.problem(row, "cpu")
    right = problem.arms["eff"]
    assert right.run is not None

    def wrong(*operands: Tensor) -> Any:
        out, lse = right.run(*operands)  # type: ignore[misc]
        return out * 1.05, lse

    arms = {"eff": gpu_arms.Arm(wrong, right.compare), "eff-right": right, "eff-raises": gpu_arms.Arm(lambda *x: 1 / 0)}
    others = {"a": gpu_arms.Arm(wrong, right.compare), "b": right}
    result = take_turns(gpu_problems.Problem(problem.sets, arms, others), row, ("eff", "eff-best"), CPU, Watch())
    assert result["arms"]["eff"]["numerics"]["within"] is False
    assert "seconds" not in result["arms"]["eff"]
    assert "ZeroDivisionError" in result["arms"]["eff-raises"]["error"]
    assert result["arms"]["eff-best"]["config"] == "b"
    assert list(result["wrong"]) == ["a"]


def test_rows_behind_the_time_are_skipped() -> None:
    case = replace(TINY, seconds=1e-9, begun=[0.0])
    (row,) = case.rows(replace(CPU, forms=("dense",)))
    (result,) = case.measure(row, CPU, Watch())
    assert {arm["skipped"] for arm in result["arms"].values()} == {"the 0 s of the case were over"}


def test_rows_cover_lengths_densities_and_dimensions() -> None:
    ids = [row.id for row in GpuAttention().rows(Settings(device="cuda"))]
    assert {f"dense-{n}" for n in (2048, 8192, 65536)} <= set(ids)
    assert {f"sparse-32768-{d}" for d in (1.0, 0.03)} <= set(ids)
    assert {f"dense-8192-d{d}" for d in (64, 72, 96, 192, 256)} <= set(ids)
    assert ids[0] == "dense-8192"
