"""Run the model matrix through our backend: equal to eager, no graph break, and the sites that the coverage table promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.coverage import GOLDEN, PAGE, page, recorded, run_through_eff
from tests.support.hf_zoo import Call, MatrixCase, cases, lost_by_dynamo, run_call, trace_call
from tests.support.hf_zoo.golden import torch_minor

ACCEPT = "python -m tests.support.coverage --accept"
WHOLE = ("llama",)  # cases whose every call runs in the quick suite
ALSO = {("mistral", "decode_static"), ("gemma3", "decode_left_pad")}  # windows over a cache
FIRST = ("bart", "whisper", "speech2text", "t5")  # the slowest to trace: their first call does


def pairs(quick_only: bool = True) -> list[object]:
    found: list[object] = []
    for case in cases():
        for call in case.calls:
            first_pad = next((c for c in case.calls if c.name.endswith("pad") and c.decode is None), None)
            padded = call is first_pad and case.twin is None and case.name not in FIRST
            also = (case.name, call.name) in ALSO
            quick = case.name in WHOLE or call is case.calls[0] or padded or also
            marks = [] if quick and quick_only else [pytest.mark.slow]
            if reason := lost_by_dynamo(case):
                marks = [pytest.mark.skip(reason=reason)]
            found.append(pytest.param(case, call, id=f"{case.name}-{call.name}", marks=marks))
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            error = (found[name] - tensor).abs().max()
            assert error <= 1e-4 * tensor.abs().max(), f"{name}: {error:.3g} of {tensor.abs().max():.3g}"
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("case", "call"), pairs())
def test_equal_to_eager_and_as_the_coverage_table_says(case: MatrixCase, call: Call) -> None:
    expected = run_call(case.build(), case, call)
    found, breaks, row = run_through_eff(case, call)
    assert_close(found, expected)
    assert (
        breaks == 0 or breaks <= trace_call(case.build(), case, call).breaks
    )  # older Dynamos break encoder-decoders themselves
    assert sum(row["sites"].values()) + sum(row["refused"].values()) > 0
    if torch_minor() == "2.13":
        assert breaks == 0
        assert row == recorded()[case.name][call.name], f"if right: {ACCEPT} {case.name}"


@pytest.mark.slow
@pytest.mark.parametrize(("case", "call"), pairs(quick_only=False))
def test_equal_to_eager_through_inductor(case: MatrixCase, call: Call) -> None:
    expected = run_call(case.build(), case, call)
    found, breaks, _ = run_through_eff(case, call, emit="inductor")
    assert_close(found, expected)
    assert breaks <= trace_call(case.build(), case, call).breaks


def test_the_page_shows_the_record() -> None:
    rows = recorded()
    assert {name: set(calls) for name, calls in rows.items()} == {c.name: {x.name for x in c.calls} for c in cases()}, (
        ACCEPT
    )
    assert PAGE.read_text() == page(rows), ACCEPT
    assert GOLDEN.exists()
