"""Check the pass counter on the published cascades and on others whose count is known by another argument."""

from __future__ import annotations

import pytest
import sympy

from effcompile.cost.cascade import (
    ONE_PASS,
    THREE_PASS,
    THREE_PASS_DEFERRED,
    TWO_PASS,
    Cascade,
    count_passes,
    operations,
    sweeps,
)

M, P, F, TILE = sympy.symbols("M P F tile", positive=True)
EXTENTS = {"m": M, "m1": M / TILE, "m0": TILE, "p": P, "e": F, "f": F}


@pytest.mark.parametrize(
    ("cascade", "passes"),
    [(THREE_PASS, 3), (THREE_PASS_DEFERRED, 2), (TWO_PASS, 2), (ONE_PASS, 1)],
    ids=lambda c: str(c),
)
def test_published_cascades(cascade: Cascade, passes: int) -> None:
    assert count_passes(cascade) == passes


def cascade(text: str, *fiber: str) -> Cascade:
    return Cascade.parse("test", fiber or ("m",), text)


@pytest.mark.parametrize(
    ("text", "fiber", "passes"),
    [
        # One look is enough for a sum; a variance around the mean needs the mean first.
        ("S[p] = sum(X[m,p])", ("m",), 1),
        ("S[p] = sum(X[m,p])\nD[m,p] = X[m,p] - S[p]\nV[p] = sum(D[m,p] * D[m,p])", ("m",), 2),
        # The one-pass variance: two sums side by side, then nothing of size m.
        ("S[p] = sum(X[m,p])\nQ[p] = sum(X[m,p] * X[m,p])\nV[p] = Q[p] - S[p] * S[p]", ("m",), 1),
        # Softmax without the maximum saves a pass; layer norm before softmax adds its own.
        ("E[m,p] = exp(X[m,p])\nS[p] = sum(E[m,p])\nA[m,p] = E[m,p] / S[p]", ("m",), 2),
        ("G[p] = max(X[m,p])\nE[m,p] = exp(X[m,p] - G[p])\nS[p] = sum(E[m,p])\nA[m,p] = E[m,p] / S[p]", ("m",), 3),
        # Running maximum element by element, without tiles.
        (
            "R[m,p] = max(R[m-1,p], X[m,p])\nD[m,p] = D[m-1,p] * exp(R[m-1,p] - R[m,p]) + exp(X[m,p] - R[m,p])",
            ("m",),
            1,
        ),
        # Split KV (flash decoding): every tile complete in itself, combined on values that are one per tile.
        (
            "X[m1,m0] = sum(Q[e] * K[e,m1,m0])\nL[m1] = max(X[m1,m0])\nE[m1,m0] = exp(X[m1,m0] - L[m1])\n"
            "D[m1] = sum(E[m1,m0])\nO[f,m1] = sum(E[m1,m0] * V[f,m1,m0])\nG[] = max(L[m1])\n"
            "W[m1] = exp(L[m1] - G[])\nS[] = sum(D[m1] * W[m1])\nA[f] = sum(O[f,m1] * W[m1]) / S[]",
            ("m1", "m0"),
            1,
        ),
        # Reading one element ahead needs the producer's sweep to be over.
        ("Y[m] = f(X[m])\nZ[m] = Y[m+1] - Y[m]", ("m",), 2),
        ("Y[m] = f(X[m])\nZ[m] = Y[m-1] - Y[m]", ("m",), 1),
        # Work that never touches the fiber makes no pass.
        ("Y[p] = f(X[p])", ("m",), 0),
    ],
)
def test_counts_that_are_known_otherwise(text: str, fiber: tuple[str, ...], passes: int) -> None:
    assert count_passes(cascade(text, *fiber)) == passes


def test_einsums_of_the_three_pass_softmax_fall_into_the_published_groups() -> None:
    by_name = dict(zip([einsum.out.tensor for einsum in THREE_PASS.einsums], sweeps(THREE_PASS)))
    assert by_name == {"QK": 1, "GM": 1, "SN": 2, "SD": 2, "A": 3, "AV": 3}


def test_a_dependence_added_to_the_one_pass_cascade_costs_a_pass() -> None:
    # The count comes from the reads: let the exponential read the global maximum and the second pass is back.
    text = "\n".join(f"{e.out.tensor}[{','.join(e.out.ranks)}] = {e.text}" for e in ONE_PASS.einsums)
    worse = text.replace("SL[m1,m0,p] = exp(QK[m1,m0,p] - RM[m1,p])", "SL[m1,m0,p] = exp(QK[m1,m0,p] - RM[m1:end,p])")
    assert worse != text
    assert count_passes(Cascade.parse("same", ONE_PASS.fiber, text)) == 1
    assert count_passes(Cascade.parse("worse", ONE_PASS.fiber, worse)) == 2


def test_vector_work_matches_the_published_counts() -> None:
    tiles = M / TILE
    assert operations(THREE_PASS, "exp", EXTENTS) == M * P
    assert sympy.simplify(operations(ONE_PASS, "exp", EXTENTS) - (M * P + tiles * P)) == 0
    assert operations(THREE_PASS, "max", EXTENTS) == M * P
    assert sympy.simplify(operations(ONE_PASS, "max", EXTENTS) - (M * P + tiles * P)) == 0
    assert operations(THREE_PASS, "/", EXTENTS) == M * P
    assert operations(THREE_PASS_DEFERRED, "/", EXTENTS) == F * P
    assert operations(ONE_PASS, "/", EXTENTS) == F * P


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Y[m] = f(Z[m])\nZ[m] = f(X[m])", "read before it is computed"),
        ("Y[m] = f(Y[m+1])", "later elements"),
        ("Y[m] - f(X[m])", "not an einsum"),
        ("Y[m] = 3", "not an einsum"),
        ("Y[m*2] = f(X[m])", "cannot read the rank"),
    ],
)
def test_cascades_that_mean_nothing_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        count_passes(cascade(text))
