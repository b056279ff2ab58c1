"""Compare every dispatch of experts with float64: written out in a graph, at sites that it supports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from effcompile import ops
from effcompile.compiler import all_dispatches
from effcompile.core.experts import ExpertDispatch, Gate, MoESite
from effcompile.core.kernel import Answer, Supported
from effcompile.core.plan import Choice, Plan
from effcompile.core.program import Entry, Input, Program
from effcompile.core.site import Refusal
from effcompile.core.target import Target
from effcompile.lowering.moe.block_aligned import BlockAligned
from effcompile.lowering.moe.lower import lower_experts
from effcompile.passes.recognize.experts import recognize_experts
from effcompile.planning.experts import with_experts
from effcompile.targets import devices
from tests.support import experts as support

ops.register()
TARGETS = (Target.parse("x86-64-avx512", devices()), Target.parse("sm_90", devices()))
OSS = Gate("silu", "interleaved", alpha=1.702, beta=1.0, limit=1.0)
CASES = {
    "plain": support.make(9, 16, 24, 4, 2),
    "oss": support.make(9, 16, 24, 4, 2, OSS, bias=True, transposed=True),
    "ungated": support.make(9, 16, 24, 4, 4, Gate("relu2", "none")),
    "input": support.make(9, 16, 24, 4, 1, side="in"),
}


def program(made: support.Experts) -> Program:
    tensors = [t for t in made.args if isinstance(t, torch.Tensor)]

    def run(*given: torch.Tensor) -> torch.Tensor:
        left = list(given)
        return torch.ops.eff.moe_v1(*[left.pop(0) if isinstance(a, torch.Tensor) else a for a in made.args])

    graph = make_fx(run, tracing_mode="fake", pre_dispatch=True)(*tensors)
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    inputs = tuple(Input(node.name, "user", node.name, value) for node, value in zip(nodes, tensors))
    return Program((Entry("forward", graph, inputs),))


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dispatch", all_dispatches(), ids=lambda item: item.name)
def test_a_dispatch_gives_what_the_op_means(dispatch: ExpertDispatch, name: str, target: Target) -> None:
    made = CASES[name]
    made.ids[2, 0] = made.w1.shape[0]  # a token of another rank
    if dispatch.name == "grouped":
        made = made.to(torch.bfloat16)
    found = recognize_experts(program(made), lambda node: ("", ""))
    (site,) = found.sites
    if isinstance(dispatch.supports(site, target), Refusal):
        pytest.skip("not on this target, not this site")
    plan = Plan.single(str(target), [Choice(site.id, "moe", dispatch.name)])
    lowered = lower_experts(found.program, plan, found.sites, [dispatch]).entries[0].graph
    tensors = [t for t in made.args if isinstance(t, torch.Tensor)]
    exact = support.oracle(made)
    bound = 1e-5 if made.x.dtype == torch.float32 else 1.5e-2
    assert support.error(lowered(*tensors), exact) < bound


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_cheapest_runs_and_what_was_asked_for_comes_first(target: Target) -> None:
    (site,) = recognize_experts(program(CASES["plain"].to(torch.bfloat16)), lambda node: ("", "")).sites
    base = Plan.single(str(target))
    plan = with_experts(base, [site], (), target, all_dispatches())
    choice = plan.of(site.id, "moe")
    assert choice is not None
    able = [item.supports(site, target) for item in all_dispatches()]
    usual = [a for item, a in zip(all_dispatches(), able) if isinstance(a, Supported) and not item.on_request]
    assert choice.seconds == min(answer.seconds for answer in usual)
    assert plan.fingerprints == ((site.id, site.fingerprint),)
    asked = with_experts(base, [site], (), target, all_dispatches(), "grouped").of(site.id, "moe")
    assert asked is not None
    assert asked.policy == "grouped"


def shaped(target: Target, dtype: torch.dtype = torch.bfloat16) -> dict[int, dict[str, Supported | Refusal]]:
    """Return what every dispatch answers at the sizes of Qwen3-30B-A3B, for one token and for 4,096."""
    (site,) = recognize_experts(program(CASES["plain"].to(dtype)), lambda node: ("", "")).sites
    site = replace(site, experts=128, top_k=8, hidden=2048, inner=768)
    return {
        n: {item.name: item.supports(replace(site, tokens=n), target) for item in all_dispatches()} for n in (1, 4096)
    }


def chosen(site: MoESite, target: Target, dispatches: Sequence[ExpertDispatch], asked: str = "") -> str:
    choice = with_experts(Plan.single(str(target)), [site], (), target, dispatches, asked).of(site.id, "moe")
    assert choice is not None
    return choice.policy


@pytest.mark.parametrize(
    ("dtype", "prefill", "decode"),
    [(torch.bfloat16, "grouped", "batched"), (torch.float16, "batched", "batched"), (torch.float32, "loop", "batched")],
)
def test_a_gpu_runs_kernels_that_were_never_timed_only_where_they_are_asked_for(
    dtype: torch.dtype, prefill: str, decode: str
) -> None:
    (site,) = recognize_experts(program(CASES["plain"].to(dtype)), lambda node: ("", "")).sites
    site = replace(site, experts=128, top_k=8, hidden=2048, inner=768)
    one, many = replace(site, tokens=1), replace(site, tokens=4096)
    found = [chosen(item, TARGETS[1], all_dispatches()) for item in (many, one)]
    assert "block-aligned" not in found
    if dtype == torch.bfloat16:
        assert found == [prefill, decode]
    assert chosen(many, TARGETS[1], all_dispatches(), "block-aligned") == "block-aligned"


def test_a_measured_time_of_them_counts() -> None:
    class Timed(BlockAligned):
        def supports(self, site: MoESite, target: Target) -> Answer:
            return Supported(1e-9, "measured")

    (site,) = recognize_experts(program(CASES["plain"].to(torch.bfloat16)), lambda node: ("", "")).sites
    others = [item for item in all_dispatches() if item.name != "block-aligned"]
    assert chosen(site, TARGETS[1], [*others, Timed()]) == "block-aligned"
    assert chosen(site, TARGETS[1], [BlockAligned()]) == "block-aligned"  # nothing else can


@pytest.mark.parametrize(
    ("word", "dtype", "runs"),
    [
        ("sm_80", torch.float32, True),
        ("gfx942", torch.bfloat16, True),
        ("sm_75", torch.float16, False),
        ("sm_90", torch.float64, False),
        ("x86-64-avx512", torch.bfloat16, False),
    ],
)
def test_blocks_of_rows_are_for_gpus_that_have_the_kernels(word: str, dtype: torch.dtype, runs: bool) -> None:
    """Where they decline they say why."""
    answers = shaped(Target.parse(word, devices()), dtype)[4096]
    assert isinstance(answers["block-aligned"], Supported) == runs
    if not runs:
        assert answers["block-aligned"].code == "EFF-M209"  # type: ignore[union-attr]
        assert any(isinstance(answer, Supported) for answer in answers.values())
