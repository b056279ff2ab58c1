"""Read mask and score functions of flex_attention calls as they compute, and refuse steps that are not attention's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from effcompile.core.expr import axis
from effcompile.core.expr_eval import evaluate
from effcompile.core.mask import Mask
from effcompile.ops.attention import grid
from effcompile.passes.recognize.mods import read_mask_mod
from tests.support.flex import (
    INF,
    D,
    H,
    Mod,
    causal,
    check_kept_call,
    check_raised,
    masked,
    mods,
    qkv,
    scored,
    traced,
)


def test_softcap_alibi_and_relative_bias() -> None:
    soft = masked(causal, score=lambda s, b, h, i, j: 20 * torch.tanh(s / 20))
    check_raised(soft, qkv(), "causal", softcap=20.0, scale=D**-0.5)

    def alibi(slopes: Tensor, s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + slopes[h] * (j - i)

    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    check_raised(masked(lambda _, *at: causal(*at), score=alibi), (*qkv(), slopes), "causal & bias(alibi)")
    check_raised(scored(alibi), (*qkv(), slopes), "full & bias(alibi)")

    def relative(table: Tensor, s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return 0.5 * s - table[h, (i - j + 150).clamp(min=0)]

    table = torch.randn(H, 301)
    check_raised(scored(relative), (*qkv(), table), "full & bias(relative)", scale=0.5 * D**-0.5)


def test_a_softcap_then_a_bias_then_a_mask() -> None:
    def score(slopes: Tensor, s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        s = torch.tanh(s * 0.1) * 15 + slopes[h] * (i - j).abs()
        return torch.where((i - j) % 3 == 0, s, -INF)

    raised = check_raised(masked(lambda _, *at: causal(*at), score=score), (*qkv(), torch.rand(H)), softcap=15.0)
    assert raised.sites[0].scale == pytest.approx(1.5 * D**-0.5)


def test_a_negative_scale_and_what_is_added_to_the_least_number() -> None:
    check_raised(scored(lambda s, b, h, i, j: torch.where(i >= j, s * -0.5, -INF)), qkv(9, 9), "causal")
    least = torch.finfo(torch.float32).min

    def score(bias: Tensor, s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i > j, s, least) + bias[h] * j  # the first row is empty: the mean of all values

    check_raised(scored(score), (*qkv(9, 9), torch.rand(H)))


@pytest.mark.parametrize("fill", [-INF, -1e9])
def test_rows_that_a_score_function_empties(fill: float) -> None:
    """A row of -inf gives zeros, a row of one finite number the mean of what the mask function kept."""

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where((j > 3) & (i >= j), s, fill)

    raised = check_raised(scored(score), qkv(20, 20))
    assert isinstance(raised.sites[0].mask, Mask)
    assert raised.sites[0].mask.empty_row == ("zero" if fill == -INF else "uniform")
    check_raised(masked(causal, score=score), qkv(20, 20))


@pytest.mark.parametrize(
    ("code", "reason", "score"),
    [
        ("EFF-A106", "`pow`", lambda t, s, b, h, i, j: s**2),
        ("EFF-A106", "`mul` of the score", lambda t, s, b, h, i, j: s * s),
        ("EFF-A106", "ignores the score", lambda t, s, b, h, i, j: (i - j) * 1.0),
        ("EFF-A106", "by a tensor", lambda t, s, b, h, i, j: s * t[h]),
        ("EFF-A106", "decides by the score", lambda t, s, b, h, i, j: torch.where(s > 0, s, -INF)),
        ("EFF-A106", "different scale", lambda t, s, b, h, i, j: torch.where(i >= j, s, s * 0.5)),
        ("EFF-A106", "may not outweigh", lambda t, s, b, h, i, j: torch.where(i >= j, s, -100.0)),
        ("EFF-A106", "may not outweigh", lambda t, s, b, h, i, j: torch.where(i >= j, s, INF)),
        ("EFF-A106", "may not outweigh", lambda t, s, b, h, i, j: torch.where(i >= j, s, t[h])),
        (
            "EFF-A106",
            "different numbers",
            lambda t, s, b, h, i, j: torch.where(i > j, torch.where(j > 2, s, -1e9), -1e10),
        ),
        ("EFF-A104", "adds to scores that became -1e+09", lambda t, s, b, h, i, j: torch.where(i > j, s, -1e9) + t[h]),
        ("EFF-A106", "`maximum`", lambda t, s, b, h, i, j: torch.maximum(s, t[h])),
        ("EFF-A106", "`neg`", lambda t, s, b, h, i, j: -s),
        ("EFF-A106", "`sub` of the score", lambda t, s, b, h, i, j: t[h] - s),
        ("EFF-A106", "rounds the score", lambda t, s, b, h, i, j: s.to(torch.bfloat16)),
        ("EFF-A106", "around", lambda t, s, b, h, i, j: torch.tanh(s) * -2),
        ("EFF-A104", "scales", lambda t, s, b, h, i, j: (s + t[h]) * 2),
        ("EFF-A104", "caps", lambda t, s, b, h, i, j: torch.tanh(s + t[h])),
        ("EFF-A104", "scales", lambda t, s, b, h, i, j: torch.where(i >= j, s, -INF) * -1),
        ("EFF-A103", "`sin`", lambda t, s, b, h, i, j: s + torch.sin(t[h])),
    ],
)
def test_score_functions_that_are_not_attention(code: str, reason: str, score: Mod) -> None:
    check_kept_call(scored(score), (*qkv(9, 9), torch.rand(H)), code, reason)


def test_a_bias_that_is_a_tensor_over_all_pairs() -> None:
    def score(bias: Tensor, s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + bias[h, i, j]

    check_kept_call(scored(score), (*qkv(9, 9), torch.randn(H, 9, 9)), "EFF-A103", "data over query and key positions")


def test_a_mask_function_with_an_unknown_operation() -> None:
    call = masked(lambda b, h, i, j: torch.sin(i - j) > 0)
    check_kept_call(call, qkv(), "EFF-A103", "`sin`")


@given(mods(), st.integers(0, 99))
def test_a_mask_function_is_read_as_it_computes(mod: Mod, seed: int) -> None:
    rows, columns = 7, 9
    table = torch.randint(0, 3, (2, columns), generator=torch.Generator().manual_seed(seed))
    graph, reader, captured = traced(mod, table)
    found = read_mask_mod(graph, captured, reader, 1)
    expected = create_mask(lambda b, h, i, j: mod(table, b, h, i, j), 2, 3, rows, columns, device="cpu")
    value = evaluate(found, grid(2, 3, rows, columns, torch.device("cpu")), [table for _ in reader.loads], [])
    assert torch.equal(value.expand(expected.shape), expected)


def test_axes_are_those_of_the_call() -> None:
    graph, reader, captured = traced(lambda t, b, h, i, j: i >= j, torch.zeros(2, 9, dtype=torch.int64))
    found = read_mask_mod(graph, captured, reader, 1)
    assert (found.op, found.args) == ("le", (axis(3), axis(2)))
