"""Check the choice between two callables by a size: the border, a second range that fails, assumptions that do not hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
from torch import fx

from effcompile.codegen.by_size import Assumptions, Late, by_size
from effcompile.core.plan import Split
from effcompile.core.sizes import SizePlace

S = sympy.Symbol("s", integer=True, positive=True)
SPLIT, PLACE = Split("s", 10), SizePlace(0)


@dataclass
class Given(Late):
    """Compile nothing: return what it is given, or fail."""

    conditions: Sequence[Any] = ()
    broken: bool = False
    count: int = 0

    def compile(self) -> Any:
        """Return a callable that says `second`."""
        self.count += 1
        if self.broken:
            raise ZeroDivisionError("on purpose")
        return lambda n: ("second", n), Assumptions(tuple(self.conditions), ((S, PLACE),))


def late(**fields: Any) -> Given:
    return Given(lambda: fx.GraphModule({}, fx.Graph()), None, (), **fields)  # type: ignore[arg-type]


def run(given: Given, hint: int, *values: int) -> list[str]:
    told: list[str] = []
    call = by_size(
        lambda n: ("first", n),
        given,
        SPLIT,
        PLACE,
        hint,
        compiled=told.append,
        failed=lambda error: told.append(str(error)),
    )
    found = [call(value) for value in values]
    assert [value for _, value in found] == list(values)
    return [name for name, _ in found] + told


def test_the_border_belongs_to_the_range_above() -> None:
    assert run(late(), 5, 9, 10, 11, 1) == ["first", "second", "second", "first", "s >= 10"]
    assert run(late(), 10, 9, 10, 11) == ["second", "first", "first", "s < 10"]


def test_the_second_range_is_compiled_once_and_only_when_it_is_met() -> None:
    given = late()
    run(given, 5, 1, 2, 3)
    assert given.count == 0
    run(given, 5, 12, 13, 1, 14)
    assert given.count == 1


def test_a_second_range_that_fails_costs_nothing_but_speed() -> None:
    given = late(broken=True)
    assert run(given, 5, 12, 13, 3) == ["first", "first", "first", "on purpose"]
    assert given.count == 1


@pytest.mark.parametrize("condition", [S < 13, sympy.Eq(S, 12)])
def test_an_assumption_about_the_size_is_checked_at_every_call(condition: Any) -> None:
    assert run(late(conditions=(condition,)), 5, 12, 13, 12)[:3] == ["second", "first", "second"]


def test_an_assumption_that_no_input_decides_is_never_taken() -> None:
    graph = fx.Graph()
    graph.placeholder("x")
    assumed = Assumptions.of(graph, [S < 13])
    assert assumed.unread == "s"
    assert not assumed.hold((12,))
