"""Check the estimators' kernels in the interpreter against their references in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile.codegen.triton import antidiagonal, column_sums, pooled, probe
from effcompile.core.errors import EffError
from effcompile.ops import block_scores, column_scores, flash
from tests.support.attention import draw

Call = dict[str, Any]
QUARTER = settings(max_examples=settings.default.max_examples // 4)


def wide(given: Call) -> Call:
    """Return the same call with float64 operands."""
    return {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in given.items()}


@st.composite
def calls(choose: st.DrawFn) -> Call:
    """Draw what all estimators take: grouped heads, any lengths, a key range."""
    batch, kv_heads, group = choose(st.integers(1, 2)), choose(st.integers(1, 2)), choose(st.integers(1, 2))
    rows, keys, width = choose(st.integers(1, 50)), choose(st.integers(1, 70)), choose(st.sampled_from((16, 24, 72)))
    dtype, seed = choose(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))), choose(st.integers(0, 99))
    given: Call = {
        "q": draw((batch, kv_heads * group, rows, width), dtype, seed),
        "k": draw((batch, kv_heads, keys, width), dtype, seed + 1),
        "begin": None,
        "end": None,
        "right": choose(st.sampled_from((-1, 0, 5))),
        "offset": choose(st.sampled_from((keys - rows, 0, -5))),
        "scale": choose(st.sampled_from((0.2, -0.1))),
    }
    if choose(st.booleans()):
        edges = st.lists(st.integers(0, keys), min_size=batch, max_size=batch)
        given["begin"], given["end"] = (torch.tensor(choose(edges), dtype=torch.int32) for _ in range(2))
    return given


def close(got: Tensor, exact: Tensor, error: float) -> None:
    """Compare; what is -inf must be so in both."""
    assert got.dtype == torch.float32
    assert got.shape == exact.shape
    assert torch.equal(got == -math.inf, exact == -math.inf)
    there = exact != -math.inf
    if there.any():
        assert (got.double() - exact)[there].abs().max() <= error


@given(calls(), st.sampled_from((-1, 9)), st.sampled_from((16, 32)), st.sampled_from((16, 24)))
@QUARTER
def test_pooled_scores(given: Call, left: int, q_block: int, kv_block: int) -> None:
    more = {"left": left, "q_block": q_block, "kv_block": kv_block}
    close(pooled.score(**given, **more), block_scores.pooled_scores(**wide(given), **more), 1e-5)


@given(calls(), st.sampled_from(((4, 16, 16), (8, 16, 32), (8, 24, 16))))
@QUARTER
def test_antidiagonal_mass(given: Call, sizes: tuple[int, int, int]) -> None:
    more = dict(zip(("stride", "q_block", "kv_block"), sizes))
    got, exact = antidiagonal.mass(**given, **more), block_scores.antidiagonal_mass(**wide(given), **more)
    close(got, exact, 1e-5)
    assert (got.sum(-1) <= 1 + 1e-5).all()


@given(calls(), st.sampled_from((-1, 9)), st.sampled_from((0.0, 4.0)))
@QUARTER
def test_column_sums_and_probes(given: Call, left: int, softcap: float) -> None:
    more = {"left": left, "softcap": softcap}
    exact, exact_lse = column_scores.probe_scores(**wide(given), **more)
    sums, lse = probe.score(**given, **more, splits=2)
    close(sums, exact, 1e-5 * given["q"].shape[2])
    close(lse, exact_lse, 1e-4)
    again = column_sums.add_up(**given, lse=exact_lse.float(), **more)
    close(again, exact, 1e-5 * given["q"].shape[2])


def causal(rows: int, keys: int) -> Call:
    """Return a causal call."""
    q, k = draw((1, 2, rows, 24)), draw((1, 1, keys, 24), seed=1)
    return {"q": q, "k": k, "begin": None, "end": None, "right": 0, "offset": keys - rows, "scale": 0.3}


def test_keys_behind_a_block_of_queries_do_not_move_its_scores() -> None:
    given = causal(48, 48)
    changed = {**given, "k": given["k"].clone()}
    changed["k"][:, :, 32:] = 9.0
    for run, more in (
        (pooled.score, {"left": -1, "q_block": 16, "kv_block": 16}),
        (antidiagonal.mass, {"q_block": 16, "kv_block": 16, "stride": 8}),
    ):
        before, after = run(**given, **more), run(**changed, **more)  # type: ignore[operator]
        assert torch.equal(before[:, :, :2], after[:, :, :2])
        assert not torch.equal(before[:, :, 2], after[:, :, 2])


def test_column_sums_add_up_to_the_rows() -> None:
    given = causal(40, 50)
    lse = flash.flash(given["q"], given["k"], given["k"], None, None, -1, 0, 10, 0.3, 0.0)[1]
    sums = column_sums.add_up(**given, lse=lse, left=-1, softcap=0.0)
    torch.testing.assert_close(sums.sum(-1), torch.full((1, 2), 40.0))


def test_empty_operands() -> None:
    given = causal(0, 20)
    assert pooled.score(**given, left=-1, q_block=16, kv_block=16).shape == (1, 2, 0, 2)
    assert antidiagonal.mass(**given, q_block=16, kv_block=16, stride=4).shape == (1, 2, 0, 2)
    sums, lse = probe.score(**given, left=-1, softcap=0.0)
    assert torch.equal(sums, torch.zeros(1, 2, 20))
    assert lse.shape == (1, 2, 0)


@pytest.mark.parametrize("sizes", [(16, 16, 5), (16, 24, 8), (12, 16, 8)])
def test_strides_that_do_not_fit_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(EffError, match="EFF-K105"):
        antidiagonal.mass(**causal(16, 16), **dict(zip(("q_block", "kv_block", "stride"), sizes)))


def test_too_many_probes_are_refused() -> None:
    with pytest.raises(EffError, match=r"EFF-K104.*129 probe rows"):
        probe.score(**causal(129, 129), left=-1, softcap=0.0)
