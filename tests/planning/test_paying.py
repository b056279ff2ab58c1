"""Check that a policy is refused where choosing costs more than it saves, that one can insist, and that explain says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effcompile as eff
from effcompile.compiler import catalog
from effcompile.core.expr import BATCH, BOOL, KEY, axis, load
from effcompile.core.mask import CAUSAL, Mask
from effcompile.core.policy import Policy
from effcompile.core.site import AttentionSite
from effcompile.core.target import Target
from effcompile.passes.attention.block_topk import BlockTopk
from effcompile.passes.attention.quest import Quest
from effcompile.passes.attention.sink_window import SinkWindow
from effcompile.passes.attention.xattention import XAttention
from effcompile.planning.planner import Circumstances, make_plan
from effcompile.targets import cpu, devices

ZEN4 = Target(cpu.model(cpu.AVX512_BF16_NARROW, cores=2, clock=2.6e9, vendor="amd"))
FILLED = Mask(keep=load(0, (axis(BATCH), axis(KEY)), BOOL))
STEP = AttentionSite(
    "layers.3.attn", "attention", "graph", "", "sdpa", 1, 9, 3, q_len=1, kv_len=4096, mask=FILLED, scale=0.125
)
PREFILL = replace(STEP, q_len=4096, mask=CAUSAL)


def planned(policy: Policy, site: AttentionSite, target: Target = ZEN4, insist: str = "") -> tuple[str, str]:
    """Return what the plan says of a policy: (policy, reason), or (code of the refusal, its text)."""
    given = Circumstances(target, catalog(), insist=frozenset([insist]) if insist else frozenset())
    plan = make_plan((site,), (), given, (), policies=(policy,)).graphs[0]
    for choice in plan.choices:
        if choice.family == "attention":
            return choice.policy, choice.reason
    (found,) = [item.refusal for item in plan.declined if item.family == "attention"]
    return found.code, str(found)


@pytest.mark.parametrize("policy", [Quest(budget=1024, dense_layers=0), BlockTopk(dense_layers=0)])
def test_a_short_cache_is_read_whole(policy: Policy) -> None:
    """The summaries of pages read half of what dense decode reads: that pays only where the cache is long."""
    code, told = planned(policy, replace(STEP, kv_len=1536))
    assert code == "EFF-A510"
    assert "ms with its choice" in told
    assert "it pays from about" in told
    length = int(told.split("from about ")[1].split(" keys")[0].replace(",", ""))
    assert planned(policy, replace(STEP, kv_len=length))[0].startswith(policy.name)
    if length > 4096:
        assert planned(policy, replace(STEP, kv_len=length // 2))[0] == "EFF-A510"


def test_one_can_insist_and_what_does_not_choose_is_not_asked() -> None:
    short = replace(STEP, kv_len=1536)
    assert planned(Quest(budget=1024, dense_layers=0), short, insist="attention")[0].startswith("quest")
    assert planned(SinkWindow(window=8, sinks=1), replace(PREFILL, q_len=64, kv_len=64))[0].startswith("sink-window")


def test_prefill_pays_by_its_density() -> None:
    assert planned(XAttention(), PREFILL)[0].startswith("xattention")
    assert planned(XAttention(threshold=1.0), PREFILL)[0] == "EFF-A510"


def test_a_gpu_is_not_judged_by_guesses() -> None:
    target = Target.parse("sm_90", devices())
    assert planned(XAttention(threshold=1.0), replace(PREFILL, dtype="bfloat16"), target)[0].startswith("xattention")


def test_a_symbolic_length_says_from_where_it_pays() -> None:
    name, reason = planned(Quest(budget=1024, dense_layers=0), replace(STEP, kv_len="s7"))
    assert name.startswith("quest")
    assert "it pays from about" in reason


class Step(nn.Module):
    """Attend with one query to 2,048 keys."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        keys = torch.cat([k, q[:, :3] * 0 + k[:, :, :1]], 2)
        return F.scaled_dot_product_attention(q, keys, v, attn_mask=kept, enable_gqa=True)


def test_explain_says_it() -> None:
    q, k, v = torch.randn(1, 9, 1, 64), torch.randn(1, 3, 2047, 64), torch.randn(1, 3, 2048, 64)
    kept = torch.ones(1, 1, 1, 2048, dtype=torch.bool)
    asked = {"attention": "quest{budget=1024,dense_layers=0}"}
    report = eff.explain(Step(), q, k, v, kept, options=asked, target="cpu")
    assert "EFF-A510" in str(report)
    assert "ms with its choice" in str(report)
    insisted = eff.explain(Step(), q, k, v, kept, options={**asked, "require": {"attention": 0}}, target="cpu")
    assert "EFF-A510" not in str(insisted)
