"""Check that a vmap inside a model is captured as what it computes, and that derivatives taken inside a model are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import effcompile as eff
from effcompile.capture.dynamo import CaptureRefused, capture_dynamo
from effcompile.core.program import Program

CHEAP = {"emit": "interpreter", "strict": True}


def captured(function: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> tuple[Program, list[Any]]:
    """Return the program of a function's one graph, and what it was called with."""
    found: list[Any] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        before = graph.code
        found.append(capture_dynamo(graph, inputs))
        assert graph.code == before, "the module that Dynamo gave was changed"

        def run(*given: Any) -> Any:
            found.extend(given)
            return graph.forward(*given)

        return run

    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    return found[0], found[1:]


def check(function: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> Program:
    with torch.no_grad():
        program, given = captured(function, *args, dynamic=dynamic)
        graph = program.entries[0].graph
        names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        assert not [name for name in names if "vmap" in name or "batch_dim" in name], names
        assert not [
            node for node in graph.graph.nodes if node.op == "get_attr" and "_tensor_constant" in str(node.target)
        ]
        result = graph(*given)
    expected = function(*args)
    for found, wanted in zip(result, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(found, wanted)
    return program


def outer(x: Tensor, y: Tensor) -> Tensor:
    return torch.vmap(torch.vmap(lambda a, b: a * b - b.sin(), in_dims=(None, 0)), in_dims=(0, None))(x, y)


@pytest.mark.parametrize("dynamic", [False, True])
def test_nested(dynamic: bool) -> None:
    check(outer, torch.randn(3), torch.randn(5), dynamic=dynamic)


def test_several_with_work_between_and_two_results() -> None:
    def run(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.vmap(lambda row: (row.min(), row.max()))(x)
        spread = torch.relu(high - low)
        return torch.vmap(lambda row, by: table[row.argmax()] * by)(x, spread), low

    check(run, torch.randn(4, 6), torch.randn(6, 2))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_regions_between_nodes_that_repeat(count: int) -> None:
    """The run after each region is one that capture would trace once and copy: it must not be copied across a region."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        for _ in range(count):
            low = outer(x[:, 0], y)
            x = torch.relu(x).sin().cos().tanh().exp().neg() + low.mean()
            x = torch.sigmoid(x).sin().cos().tanh().exp().neg() * low.sum()
        return x

    check(run, torch.randn(3, 5), torch.randn(5), dynamic=False)


def test_a_write_to_what_came_from_outside() -> None:
    def run(x: Tensor) -> Tensor:
        made = x * 2
        torch.vmap(lambda row: row.add_(1))(made)
        return made.sin()

    check(run, torch.randn(3, 2))


def test_a_region_inside_a_branch_is_refused() -> None:
    def run(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: torch.vmap(torch.sin)(y), lambda y: torch.vmap(torch.cos)(y), (x,))

    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(run, backend="eff", options=CHEAP)(x), run(x))
    assert eff.report()["counters"] == {"refused EFF-G306": 1}


def test_a_write_inside() -> None:
    def run(x: Tensor) -> Tensor:
        def one(row: Tensor) -> Tensor:
            made = row.new_zeros(4)
            made[1:3] = row
            return made

        return torch.vmap(one)(x * 2)

    check(run, torch.randn(3, 2))


def test_what_surrounds_it_stays_whole() -> None:
    def run(q: Tensor, x: Tensor) -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        return out * torch.vmap(torch.sum)(x).sum()

    program = check(run, torch.randn(1, 2, 5, 8), torch.randn(3, 4))
    names = {str(node.target) for node in program.entries[0].graph.graph.nodes}
    assert "aten.scaled_dot_product_attention.default" in names


def test_gradients_past_a_vmap_that_needs_none() -> None:
    def run(x: Tensor, index: Tensor) -> Tensor:
        kept = torch.vmap(torch.vmap(lambda i, j: i >= j, in_dims=(None, 0)), in_dims=(0, None))(index, index)
        return (x.sin() * kept).sum()

    x = torch.randn(4, 4, requires_grad=True)
    index = torch.arange(4)
    torch.compile(run, backend="eff", options=CHEAP)(x, index).backward()
    found, x.grad = x.grad, None
    run(x, index).backward()
    torch.testing.assert_close(found, x.grad)
    assert eff.report()["graphs"]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch 2.15's own jvp
@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.func.grad(lambda y: (y**3).sum())(x),
        lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1],
        lambda x: torch.vmap(torch.func.grad(lambda y: (y**3).sum()))(x),
    ],
)
def test_derivatives_are_refused(function: Callable[..., Any]) -> None:
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(function, backend="eff", options=CHEAP)(x), function(x))
    assert eff.report()["counters"] == {"refused EFF-G306": 1}


def test_training_through_a_vmap_is_refused() -> None:
    with pytest.raises(Exception, match="EFF-G306") as caught:
        captured(outer, torch.randn(3, requires_grad=True), torch.randn(5))
    assert isinstance(caught.value.__cause__ or caught.value.inner_exception, CaptureRefused)  # type: ignore[attr-defined]
    x = torch.randn(3, requires_grad=True)
    torch.compile(outer, backend="eff", options=CHEAP)(x, torch.ones(5)).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 5.0))
