"""Compare attention with a row scale and an addend with float64, row by row, and its LSE with the merge of two maps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from effcompile import ops
from effcompile.core.expr import BOOL, apply, load
from effcompile.core.expr_eval import to_json
from effcompile.core.mask import CAUSAL, B, K
from effcompile.ops import native
from effcompile.ops.attention_epilogue import attention_epilogue
from tests.ops.test_attention_blocks import pairs, qkv, reference

PADDED = apply("and", CAUSAL.keep, load(0, (B, K), BOOL))


def extras(q: Tensor, v: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    scale = torch.rand(q.shape[:3], generator=draw) * 2 - 0.5
    return scale, torch.randn((*q.shape[:3], v.shape[3]), generator=draw).to(q.dtype)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 150),
    st.sampled_from([(16, 16), (40, 33), (64, 64)]),
    st.tuples(st.booleans(), st.booleans()),
    st.booleans(),
    st.integers(0, 999),
)
def test_rows_are_scaled_and_added_to(
    dtype: torch.dtype, length: int, widths: tuple[int, int], given_parts: tuple[bool, bool], padded: bool, seed: int
) -> None:
    """Also rows that the map empties, which read all that the predicate keeps, and rows that the predicate empties."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = qkv(2, (4, 2), (length, length), widths, dtype, seed)
    real = torch.rand(2, length, generator=draw) < 0.5
    keep, loads = (PADDED, [real]) if padded else (CAUSAL.keep, [])
    count = -(-length // 16)
    chosen = torch.rand(2, 2, count, count, generator=draw) < 0.4
    row_scale, addend = (x if take else None for x, take in zip(extras(q, v, seed), given_parts, strict=True))
    found, lse = attention_epilogue(q, k, v, chosen, row_scale, addend, loads, [], to_json(keep), "zero", 0.3, 16, 16)
    kept, allowed = pairs(chosen, keep, (2, 4, length, length), loads, (16, 16))
    kept = torch.where(kept.any(-1, keepdim=True), kept, allowed)
    plain, exact_lse = reference(q.double(), k.double(), v.double(), kept, 0.3)
    exact = plain if row_scale is None else plain * row_scale.double()[..., None]
    exact = exact if addend is None else exact + addend.double()
    step = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=step, atol=step)
    assert found.dtype == dtype
    assert torch.equal(lse == -math.inf, ~allowed.any(-1))
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 150),
    st.sampled_from([(16, 16), (24, 32), (64, 64)]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 999),
)
def test_tokens_stand_where_their_order_says(
    dtype: torch.dtype, length: int, blocks: tuple[int, int], padded: bool, native_runs: bool, seed: int
) -> None:
    """Map and predicate speak of places, all else of tokens: also rows that the map, or the predicate, empties."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = qkv(2, (4, 2), (length, length), (40, 33), dtype, seed)
    keep, loads = (PADDED, [torch.rand(2, length, generator=draw) < 0.5]) if padded else (CAUSAL.keep, [])
    counts = [-(-length // block) for block in blocks]
    chosen = torch.rand(2, 2, *counts, generator=draw) < (0.5 if seed % 2 else 2)
    row_scale, addend = extras(q, v, seed)
    order = torch.randperm(length, generator=draw)
    rest = (loads, [], to_json(keep), "zero", 0.3, *blocks)
    with pytest.MonkeyPatch.context() as patch:
        if not native_runs:
            patch.setattr(native, "library", lambda source: None)
        found, lse = attention_epilogue(q, k, v, chosen, row_scale, addend, *rest, order)  # type: ignore[arg-type]
    placed = (x.index_select(2, order) for x in (q, k, v))
    more = (x.index_select(2, order) for x in (row_scale, addend))
    exact, of_exact = attention_epilogue(*(x.double() for x in placed), chosen, *(x.double() for x in more), *rest)  # type: ignore[arg-type]
    step = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.index_select(2, order).double(), exact, rtol=step, atol=step)
    torch.testing.assert_close(lse.index_select(2, order), of_exact, rtol=1e-5, atol=2e-5)


def test_two_maps_merge_without_another_pass() -> None:
    """O of all keys = exp(La - L) * Oa + exp(Lb - L) * Ob: the second call adds the first one's part as it writes its own."""
    q, k, v = qkv(1, (4, 2), (100, 130), (32, 32), torch.float32)
    half = torch.rand(1, 4, 7, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    half[..., 0], half[..., 1] = True, False  # no row is without keys in either half
    rest = ([], [], "null", "never", 0.2, 16, 16)
    rest = ([], [], to_json(apply("le", K, K)), *rest[3:])
    first, a = attention_epilogue(q, k, v, half, None, None, *rest)
    _, b = attention_epilogue(q, k, v, ~half, None, None, *rest)
    total = torch.logaddexp(a, b)
    merged, _ = attention_epilogue(q, k, v, ~half, (b - total).exp(), first * (a - total).exp()[..., None], *rest)
    whole, lse = attention_epilogue(q, k, v, torch.ones_like(half), None, None, *rest)
    torch.testing.assert_close(total, lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)


def test_without_the_kernel_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(2, (4, 2), (50, 50), (16, 24), torch.float32)
    chosen = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    arguments = (q, k, v, chosen, *extras(q, v, 3), [], [], to_json(CAUSAL.keep), "zero", 0.25, 16, 16)
    found, lse = attention_epilogue(*arguments)
    monkeypatch.setattr(native, "library", lambda source: None)
    expected, expected_lse = attention_epilogue(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_op_is_registered_with_a_fake() -> None:
    ops.register()
    q, k, v = qkv(1, (2, 1), (20, 20), (16, 8), torch.float32)
    chosen = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    arguments = (q, k, v, chosen, *extras(q, v, 0), [], [], to_json(CAUSAL.keep), "never", 0.25, 16, 16)
    opcheck(torch.ops.eff.attention_epilogue_v1.default, arguments, test_utils=("test_schema", "test_faketensor"))
