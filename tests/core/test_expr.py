"""Build random expressions twice: through the simplifying constructors, and as plain torch on the full grid. They must agree."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from effcompile.core.expr import (
    BATCH,
    BOOL,
    FALSE,
    FLOAT,
    HEAD,
    INT,
    KEY,
    QUERY,
    TRUE,
    Expr,
    apply,
    at_most,
    axis,
    const,
    invert,
    linear,
    load,
    size,
)
from effcompile.core.expr_eval import apply_torch, evaluate, from_json, to_json
from effcompile.core.intervals import block_bounds
from effcompile.core.mask import diagonal_kept, settle, substitute

EXTENTS = (2, 3, 7, 9)
SIZES = [5, 0]
AXES = tuple(torch.arange(n).reshape([n if d == place else 1 for d in range(4)]) for place, n in enumerate(EXTENTS))
DRAW = torch.Generator().manual_seed(0)
LOADS = [
    torch.rand(2, 9, generator=DRAW) < 0.6,
    torch.randint(-3, 4, (2, 9), generator=DRAW),
    torch.tensor([[0.5, -1.0, float("inf"), 2.0, float("nan"), 0.0, -0.0, 3.0, float("-inf")]]).expand(2, 9),
]


@dataclass(frozen=True)
class Twin:
    """Hold an expression and the tensor that the same operations give without any simplification."""

    expr: Expr
    value: Tensor


def _leaf(expr: Expr, value: Tensor | int | float | bool) -> Twin:
    return Twin(expr, value if isinstance(value, Tensor) else torch.tensor(value, dtype=expr.dtype))


def integers() -> st.SearchStrategy[Twin]:
    leaf = st.one_of(
        st.integers(-6, 9).map(lambda n: _leaf(const(n), n)),
        st.sampled_from([BATCH, HEAD, QUERY, KEY]).map(lambda n: _leaf(axis(n), AXES[n])),
        st.sampled_from([0, 1]).map(lambda n: _leaf(size(n), SIZES[n])),
        st.sampled_from([QUERY, KEY]).map(
            lambda n: _leaf(load(1, (axis(BATCH), axis(n)), INT), LOADS[1][AXES[BATCH], AXES[n]])
        ),
    )

    def join(inner: st.SearchStrategy[Twin]) -> st.SearchStrategy[Twin]:
        two = st.sampled_from(["add", "sub", "minimum", "maximum", "mul"])
        by = st.sampled_from(["floordiv", "mod"])
        return st.one_of(
            st.builds(lambda op, a, b: _apply(op, INT, a, b), two, inner, inner),
            st.builds(lambda op, a, n: _apply(op, INT, a, _leaf(const(n), n)), by, inner, st.integers(1, 5)),
            st.builds(lambda op, a: _apply(op, INT, a), st.sampled_from(["neg", "abs", "signed"]), inner),
            st.builds(lambda c, a, b: _apply("where", INT, c, a, b), predicates(2), inner, inner),
            predicates(2).map(lambda a: _apply("to", INT, a)),
        )

    return st.recursive(leaf, join, max_leaves=5)


def predicates(leaves: int = 6) -> st.SearchStrategy[Twin]:
    if leaves == 2:
        return st.deferred(lambda: _SMALL)
    numbers = integers()
    compare = st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"])
    floats = st.sampled_from([QUERY, KEY]).map(
        lambda n: _leaf(load(2, (axis(BATCH), axis(n)), FLOAT), LOADS[2][AXES[BATCH], AXES[n]])
    )
    leaf = st.one_of(
        st.booleans().map(lambda b: _leaf(const(b), b)),
        st.builds(lambda op, a, b: _apply(op, BOOL, a, b), compare, numbers, numbers),
        st.builds(lambda op, a, b: _apply(op, BOOL, a, b), compare, floats, floats),
        st.just(_leaf(load(0, (axis(BATCH), axis(KEY)), BOOL), LOADS[0][AXES[BATCH], AXES[KEY]])),
        numbers.map(lambda a: _apply("to", BOOL, a)),
    )

    def join(inner: st.SearchStrategy[Twin]) -> st.SearchStrategy[Twin]:
        two = st.sampled_from(["and", "or", "xor", "eq", "ne"])
        return st.one_of(
            st.builds(lambda op, a, b: _apply(op, BOOL, a, b), two, inner, inner),
            inner.map(lambda a: _apply("not", BOOL, a)),
            inner.map(lambda a: Twin(invert(a.expr), ~a.value)),
            st.builds(lambda c, a, b: _apply("where", BOOL, c, a, b), inner, inner, inner),
        )

    return st.recursive(leaf, join, max_leaves=leaves)


_SMALL = st.one_of(
    st.sampled_from(["le", "eq"]).map(
        lambda op: _apply(op, BOOL, _leaf(axis(KEY), AXES[KEY]), _leaf(axis(QUERY), AXES[QUERY]))
    ),
    st.just(_leaf(load(0, (axis(BATCH), axis(KEY)), BOOL), LOADS[0][AXES[BATCH], AXES[KEY]])),
)


def _apply(op: str, dtype: torch.dtype, *args: Twin) -> Twin:
    return Twin(apply(op, *(a.expr for a in args), dtype=dtype), apply_torch(op, [a.value for a in args], dtype))


def value_of(expr: Expr) -> Tensor:
    return evaluate(expr, AXES, LOADS, SIZES).expand(EXTENTS)


@given(st.one_of(predicates(), integers()))
def test_simplifying_changes_no_value(twin: Twin) -> None:
    assert torch.equal(value_of(twin.expr), twin.value.expand(EXTENTS)), str(twin.expr)


@given(predicates())
def test_text_and_back(twin: Twin) -> None:
    assert from_json(to_json(twin.expr)) == twin.expr
    assert hash(from_json(to_json(twin.expr))) == hash(twin.expr)


@given(predicates(), st.sampled_from([(1, 1), (2, 3), (4, 4), (7, 9), (16, 2)]))
def test_block_bounds_are_sound(twin: Twin, blocks: tuple[int, int]) -> None:
    """`every` keeps all pairs of a block and not `some` keeps none, for any expression."""
    kept = twin.value.expand(EXTENTS)
    every, some = block_bounds(twin.expr, EXTENTS, blocks, LOADS, SIZES, kept.device)
    for row in range(every.shape[2]):
        for column in range(every.shape[3]):
            tile = kept[:, :, row * blocks[0] :, column * blocks[1] :][:, :, : blocks[0], : blocks[1]]
            whole, any_ = tile.flatten(2).all(-1), tile.flatten(2).any(-1)
            assert not bool((every[:, :, row, column] & ~whole).any()), str(twin.expr)
            assert not bool((~some[:, :, row, column] & any_).any()), str(twin.expr)


@given(predicates())
def test_settling_changes_nothing_in_range(twin: Twin) -> None:
    """Dropping what always holds over the index range must not change a value in that range."""
    settled = settle(twin.expr, const(EXTENTS[2]), const(EXTENTS[3]))
    assert torch.equal(value_of(settled), twin.value.expand(EXTENTS)), str(twin.expr)


@given(predicates())
def test_a_row_that_is_said_to_keep_a_key_keeps_one(twin: Twin) -> None:
    kept = twin.value.expand(EXTENTS)
    if diagonal_kept(twin.expr, const(EXTENTS[2]), const(EXTENTS[3])):
        assert bool(kept.any(-1).all()), str(twin.expr)
    square = kept[..., : EXTENTS[2]]
    if diagonal_kept(twin.expr, const(EXTENTS[2]), const(EXTENTS[2])):
        assert bool(square.any(-1).all()), str(twin.expr)


@given(predicates())
def test_substituting_is_evaluating_there(twin: Twin) -> None:
    there = substitute(twin.expr, axis(KEY), const(3))
    assert torch.equal(value_of(there)[..., 0], twin.value.expand(EXTENTS)[..., 3])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (apply("le", axis(KEY), axis(QUERY)), apply("ge", axis(QUERY), axis(KEY))),
        (apply("lt", axis(KEY), apply("add", axis(QUERY), const(1))), apply("le", axis(KEY), axis(QUERY))),
        (apply("not", apply("gt", axis(KEY), axis(QUERY))), apply("le", axis(KEY), axis(QUERY))),
        (
            apply("le", apply("mul", axis(KEY), const(2)), apply("add", apply("mul", axis(QUERY), const(2)), const(1))),
            apply("le", axis(KEY), axis(QUERY)),
        ),
        (apply("eq", apply("sub", axis(QUERY), axis(KEY)), const(0)), apply("eq", axis(KEY), axis(QUERY))),
    ],
)
def test_spellings_of_one_predicate_are_one_value(a: Expr, b: Expr) -> None:
    assert a == b


def test_numbers_wrap_around_nowhere() -> None:
    """An unknown number is unbounded; twice an unknown number still is."""
    far = apply("mod", apply("sub", axis(QUERY), axis(KEY)), axis(KEY))
    for expr in (apply("add", far, far), apply("mul", far, const(2**40)), apply("sub", const(0), far)):
        every, some = block_bounds(at_most(expr, const(3)), (1, 1, 8, 8), (4, 4), [], [], torch.device("cpu"))
        assert not bool(every.any())
        assert bool(some.all())


def test_folding_is_torchs_own() -> None:
    assert apply("floordiv", const(-7), const(2)).value == -4
    assert apply("mod", const(-7), const(2)).value == 1
    assert apply("to", const(-3.4028234663852886e38), dtype=torch.bfloat16).value == float("-inf")
    assert apply("and", TRUE, FALSE) == FALSE
    assert linear(apply("mul", apply("add", axis(KEY), const(3)), const(-2))) == ({axis(KEY): -2}, -6)
