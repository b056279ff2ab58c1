"""An engine with several profiles runs a call by the first that its sizes lie in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from effcompile.codegen.tensorrt.session import EngineSession

PROFILES = [{"x": ((2, 8), (2, 8), (2, 8))}, {"x": ((1, 16), (2, 16), (4, 32))}]


class Engine:
    """Stand in for an engine of two profiles."""

    num_optimization_profiles = 2

    def get_tensor_profile_shape(self, name: str, number: int) -> Any:
        return PROFILES[number].get(name, ((), (), ()))


@pytest.mark.parametrize(
    ("shapes", "chosen"), [([(2, 8)], []), ([(2, 16)], [1]), ([(4, 32), (2, 8), (2, 8)], [1, 0]), ([(9, 9)], [])]
)
def test_profiles_are_chosen_by_the_shapes_of_a_call(shapes: list[tuple[int, ...]], chosen: list[int]) -> None:
    calls: list[int] = []
    session = EngineSession.__new__(EngineSession)
    session._engine, session._profile = Engine(), 0
    session._context = SimpleNamespace(set_optimization_profile_async=lambda number, stream: calls.append(number))
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    for shape in shapes:
        session._choose({"x": shape, "fixed": ()}, stream)
    assert calls == chosen
