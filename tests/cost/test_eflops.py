"""Check the FLOP-equivalent model against sums over the decoded tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effcompile.cost.eflops import Decoder, block_sparse, dense, tokens_read

LENGTHS = st.integers(0, 3000)
SMALL = Decoder(parameters=6 * 10**8, layers=28, heads=16, kv_heads=8, head_dim=128)


@given(LENGTHS, LENGTHS, LENGTHS)
def test_tokens_read_equals_the_sum(prompt: int, output: int, budget: int) -> None:
    assert tokens_read(prompt, output, budget) == sum(min(budget, prompt + t) for t in range(output))


@given(LENGTHS, LENGTHS, LENGTHS)
def test_the_continuous_form_is_off_by_half_a_token_per_growing_step(prompt: int, output: int, budget: int) -> None:
    growing = min(max(budget - prompt, 0), output)
    gap = tokens_read(prompt, output, budget, continuous=True) - tokens_read(prompt, output, budget)
    assert 2 * gap == growing


def test_the_case_that_the_published_top_k_variant_overcounts() -> None:
    budget, prompt, output = 1024, 100, 8000
    right = sum(min(budget, prompt + t) for t in range(output))
    assert tokens_read(prompt, output, budget) == right
    assert (budget * output + (budget - prompt) ** 2 / 2) / right == pytest.approx(1.11, abs=0.01)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 5))
def test_dense_equals_a_loop_over_steps(prompt: int, output: int, trials: int) -> None:
    cost = dense(SMALL, prompt, output, trials=trials, batch=4)
    flops = kv_bytes = weight_bytes = 0.0
    for step in range(output):
        own = step + 0.5  # mid-step: the closed form integrates
        flops += trials * 2 * SMALL.parameters
        flops += trials * 4 * SMALL.heads * SMALL.head_dim * SMALL.layers * (prompt + own)
        kv_bytes += 2 * SMALL.kv_elements * (prompt + trials * own)
        weight_bytes += 2 * SMALL.parameters / 4
    assert float(cost.flops) == pytest.approx(flops)
    assert float(cost.kv_bytes) == pytest.approx(kv_bytes)
    assert float(cost.weight_bytes) == pytest.approx(weight_bytes)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 800), st.integers(1, 5))
def test_block_sparse_equals_a_loop_over_steps(prompt: int, output: int, budget: int, trials: int) -> None:
    page, width = 16, SMALL.head_dim * SMALL.layers
    cost = block_sparse(SMALL, prompt, output, budget, page=page, trials=trials)
    flops = kv_bytes = 0.0
    for step in range(output):
        context = prompt + step + 0.5
        read = prompt + step + 0.5 if prompt + step < budget else budget
        flops += trials * (
            2 * SMALL.parameters + 4 * SMALL.heads * width * read + 2 * SMALL.heads * width * context / page
        )
        kv_bytes += trials * 4 * SMALL.kv_heads * width * read
        kv_bytes += 2 * SMALL.kv_heads * width * (prompt + trials * (step + 0.5)) / page
    assert float(cost.flops) == pytest.approx(flops)
    assert float(cost.kv_bytes) == pytest.approx(kv_bytes)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_an_unlimited_budget_reads_what_dense_reads(prompt: int, output: int) -> None:
    page = 10**12
    sparse, full = block_sparse(SMALL, prompt, output, 10**9, page=page), dense(SMALL, prompt, output)
    assert float(sparse.flops) == pytest.approx(float(full.flops))
    assert float(sparse.kv_bytes) == pytest.approx(float(full.kv_bytes))


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 2000))
def test_both_combinations(prompt: int, output: int, budget: int) -> None:
    cost = block_sparse(SMALL, prompt, output, budget)
    added, overlapped = float(cost.eflops(206)), float(cost.eflops(206, combine="max"))
    assert overlapped <= added <= 2 * overlapped


def test_weights_are_shared_by_the_batch() -> None:
    one, many = dense(SMALL, 100, 1000), dense(SMALL, 100, 1000, batch=64)
    assert one.weight_bytes == 64 * many.weight_bytes == 2 * SMALL.parameters * 1000
    assert one.eflops(206) > many.eflops(206)


def test_a_small_budget_pays_on_long_outputs() -> None:
    full = dense(SMALL, 1000, 30_000, batch=256)
    sparse = block_sparse(SMALL, 1000, 30_000, 1024, batch=256)
    assert float(full.eflops(206) / sparse.eflops(206)) > 4
