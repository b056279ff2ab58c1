"""Compare every dispatch of experts with float64: written out in a graph, at sites that it supports."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from effcompile import ops
from effcompile.compiler import all_dispatches
from effcompile.core.experts import ExpertDispatch, Gate
from effcompile.core.plan import Choice, Plan
from effcompile.core.program import Entry, Input, Program
from effcompile.core.site import Refusal
from effcompile.core.target import Target
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
    assert choice.seconds == min(answer.seconds for answer in able if not isinstance(answer, Refusal))
    assert plan.fingerprints == ((site.id, site.fingerprint),)
    asked = with_experts(base, [site], (), target, all_dispatches(), "grouped").of(site.id, "moe")
    assert asked is not None
    assert asked.policy == "grouped"


def test_prefill_on_a_gpu_is_grouped_and_decode_batched() -> None:
    from dataclasses import replace

    (site,) = recognize_experts(program(CASES["plain"].to(torch.bfloat16)), lambda node: ("", "")).sites
    shaped = replace(site, experts=128, top_k=8, hidden=2048, inner=768)

    def best(tokens: int) -> str:
        known = {item.name: item.supports(replace(shaped, tokens=tokens), TARGETS[1]) for item in all_dispatches()}
        able = {name: answer.seconds for name, answer in known.items() if not isinstance(answer, Refusal)}
        return min(able, key=able.__getitem__)

    assert best(4096) == "grouped"
    assert best(1) == "batched"
