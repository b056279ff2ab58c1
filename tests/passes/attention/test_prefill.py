"""Check the tail of patterns for prompts: the last queries read everything, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from effcompile.core.mask import Mask
from effcompile.passes.attention.block_topk import BlockTopk
from effcompile.passes.attention.dynamic import DynamicPattern
from tests.passes.attention.test_dynamic import PREFILL, SITE, causal, chosen_pairs, named, qkv, step


@pytest.mark.parametrize("policy", PREFILL, ids=named)
@pytest.mark.parametrize("tail", [1, 16, 40, 500])
def test_the_tail_reads_everything(policy: DynamicPattern, tail: int) -> None:
    """The blocks with one of the last queries are whole, those before them are as without a tail."""
    args = qkv(1, (4, 2), (150, 150))
    order = torch.ones(150, 150, dtype=torch.bool).tril()
    without = chosen_pairs(replace(policy, tail=0), causal, args) & order  # type: ignore[call-arg]
    kept = chosen_pairs(replace(policy, tail=tail), causal, args) & order  # type: ignore[call-arg]
    height = policy.blocks(SITE)[0]
    first = max(0, 150 - tail) // height * height
    assert not torch.equal(without[:, :, first:], order[first:].expand_as(without[:, :, first:])), (
        "the tail adds nothing"
    )
    assert torch.equal(kept[:, :, first:], order[first:].expand_as(kept[:, :, first:]))
    assert torch.equal(kept[:, :, :first], without[:, :, :first])


def test_a_tail_counts_in_the_density_and_not_in_decode() -> None:
    plain, late = BlockTopk(density=0.1), BlockTopk(density=0.1, tail=128)
    # 128 of 4,096 rows hold 6 % of the causal pairs.
    assert late.expected(SITE) == pytest.approx(0.1 + 0.9 * (2 * 128 / 4096 - (128 / 4096) ** 2), abs=0.01)
    step_site = replace(SITE, q_len=1, mask=Mask())
    assert late.expected(step_site) == plain.expected(step_site)
    args = qkv(1, (4, 2), (1, 100))
    budget = replace(late, budget=32, page=8, dense_layers=0)
    assert int((chosen_pairs(budget, step, args)).sum(-1).max()) <= 32
