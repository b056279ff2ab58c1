"""Check the error ledger against errors of known size, and its rule against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effcompile.core.plan import Plan
from effcompile.core.program import Entry, Input, Program
from effcompile.core.rewrite import Pass
from effcompile.models import zoo
from effcompile.numerics import blame, ledger
from effcompile.planning.ledger import Reference, distance, execute, largest, measure
from tests.cli import samples


def program_of(function: object, *inputs: torch.Tensor) -> Program:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function)(*inputs)  # type: ignore[arg-type]
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    return Program((Entry("forward", graph, tuple(Input(name, "user", name) for name in names)),))


def test_an_error_of_known_size_is_found_where_it_is_added() -> None:
    x = torch.linspace(0, 1, 2000)
    right = program_of(lambda x: x * 3, x)
    wrong = program_of(lambda x: x * 3 + 0.25, x)
    found = measure([("captured", right), ("one", right), ("two", wrong), ("three", wrong)], [x])
    one, two, three = found.rows
    assert (one.added, one.within) == (0.0, True)
    assert two.added == pytest.approx(0.25, abs=1e-6)
    assert two.rmse == pytest.approx(0.25, abs=1e-6)
    assert not two.within
    assert (three.added, three.max_abs) == (0.0, pytest.approx(0.25, abs=1e-6))
    assert (found.culprit, found.within) == ("two", False)


def test_the_float64_run_is_one() -> None:
    x = torch.rand(4000)
    program = program_of(lambda x: (x.to(torch.float32) * 1e-3).sum() + torch.ones(1, dtype=torch.float32), x)
    exact = execute(program, [x], widen=True)[0]
    assert exact.dtype is torch.float64
    assert float(exact) == pytest.approx(float((x.double() * 1e-3).sum() + 1), rel=1e-14)


def test_inputs_are_not_written_to_and_writes_are_compared() -> None:
    x = torch.zeros(3)
    right, wrong = program_of(lambda x: x.add_(1) * 1, x.clone()), program_of(lambda x: x.add_(2) - 1, x.clone())
    found = measure([("captured", right), ("writes", wrong)], [x])
    assert torch.equal(x, torch.zeros(3))
    assert found.rows[0].max_abs == 1.0  # the result is equal, what was written is not


def test_not_a_number_is_no_agreement() -> None:
    nan, one = torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 1.0])
    assert largest(nan, one) == math.inf
    assert distance(nan, nan) == 0.0
    assert largest(torch.tensor([math.inf]), torch.tensor([math.inf])) == 0.0
    assert largest(torch.zeros(2), torch.zeros(3)) == math.inf


@given(st.floats(1e-9, 1e-2), st.floats(1e-9, 1e-2), st.integers(0, 2**31))
def test_the_rule_is_that_of_torch(mine: float, theirs: float, seed: int) -> None:
    from torch._dynamo.utils import same

    draw = torch.Generator().manual_seed(seed)
    exact = torch.randn(4096, generator=draw, dtype=torch.float64)
    base = (exact + theirs * torch.randn(4096, generator=draw)).float()
    found = (exact + mine * torch.randn(4096, generator=draw)).float()
    row = Reference((base,), (exact,)).compare("x", (found,), (base,))
    if torch.allclose(base, found, atol=1e-4, rtol=1e-4):
        return  # torch accepts it before it looks at the rule
    assert row.within == same(base, found, fp64_ref=exact, tol=1e-4, log_error=lambda *_: None)


def test_a_model_pass_by_pass() -> None:
    loaded = zoo.load("llama-tiny")
    args, kwargs = loaded.example_inputs(2)
    (found,) = ledger(loaded.model, *args, **kwargs)
    assert found.ledger.within
    stages = [row.stage for row in found.ledger.rows]
    assert stages[0] == "remove-identities"
    assert stages.index("recognized") + 1 == stages.index("kernels")
    assert all(0 < row.rmse < 1e-4 for row in found.ledger.rows)


def test_half_precision_has_its_own_tolerance() -> None:
    loaded = zoo.load("llama-tiny", dtype=torch.bfloat16)
    args, _ = loaded.example_inputs(2)
    padding = torch.tensor([[1] * 32, [1] * 20 + [0] * 12])
    (found,) = ledger(loaded.model, *args, padding=padding)
    assert found.ledger.within
    assert found.ledger.rows[-1].base_rmse > 1e-3


def test_the_wrong_pass_is_blamed_wherever_it_stands() -> None:
    class Harmless(samples.WrongActivation):
        name = "harmless"
        phase = "raised"

        def run(self, program: Program, plan: Plan) -> object:  # type: ignore[override]
            from effcompile.core.rewrite import PassResult

            return PassResult(program, True)

    model, args = samples.plain()
    passes: list[Pass] = [Harmless(), samples.WrongActivation()]
    found = blame(model, *args, options={"passes": passes}, compiled=False)
    assert (found.culprit, found.confirmed) == ("wrong-activation", True)
    assert [row.stage for row in found.rows if row.within][-1] != "wrong-activation"
    assert blame(model, *args, options={"passes": [Harmless()]}, compiled=False).culprit is None
