"""Check the model matrix itself: it runs, its masks matter, and plain Dynamo gives the same numbers.

Whatever uses the matrix compares with the eager run, so the eager run is checked here against what it must be:
decoding continues the prompt, and a mask that is taken away shows.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.hf_zoo import Call, MatrixCase, cases, lost_by_dynamo, outputs, run_call, trace_call
from tests.support.hf_zoo.golden import PATH, recorded, render, torch_minor

ACCEPT = "python -m tests.support.hf_zoo --accept"
WHOLE = ("llama", "gemma3")  # the matrix is checked on these in the quick run, on the others in `make test-all`
MASKS = ("attention_mask", "decoder_attention_mask", "encoder_attention_mask")


def marks(case: MatrixCase) -> list[pytest.MarkDecorator]:
    """Return the mark of a case that the quick run leaves out: these tests check what other tests compare with."""
    return [] if case.name in WHOLE else [pytest.mark.slow]


every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=marks(case)) for case in cases()])


def calls_that(keep: Callable[[Call], bool]) -> pytest.MarkDecorator:
    """Parametrize by the calls of all cases that `keep` wants."""
    pairs = [
        pytest.param(case, call, id=f"{case.name}-{call.name}", marks=marks(case))
        for case in cases()
        for call in case.calls
        if keep(call)
    ]
    return pytest.mark.parametrize(("case", "call"), pairs)


def arguments(call: Call) -> dict[str, Any]:
    return call.make(call.batch, call.length, 0)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_names_are_unique_and_twins_exist() -> None:
    assert [name for name, count in Counter(case.name for case in cases()).items() if count > 1] == []
    for case in cases():
        assert len({call.name for call in case.calls}) == len(case.calls), case.name
    assert {case.twin for case in cases() if case.twin} <= {case.name for case in cases() if case.twin is None}


@every_case
def test_two_builds_are_equal(case: MatrixCase) -> None:
    one, other = case.build(), case.build()
    assert not one.training
    assert_equal(one.state_dict(), other.state_dict(), tolerance=0.0)
    call = case.calls[0]
    assert_equal(run_call(copy.deepcopy(one), case, call), run_call(other, case, call), tolerance=0.0)


@calls_that(lambda call: True)
def test_outputs_are_finite_and_of_the_expected_shape(case: MatrixCase, call: Call) -> None:
    found = run_call(case.build(), case, call)
    assert all(tensor.isfinite().all() for tensor in found.values() if tensor.is_floating_point())
    shapes = call.shapes(call.batch, call.length)
    if call.decode is None:
        assert {name: tuple(found[name].shape) for name in shapes} == shapes
        return
    for name, (batch, length, *rest) in shapes.items():
        assert tuple(found[f"prefill.{name}"].shape) == (batch, length, *rest)
        for step in range(len(call.decode.steps(call.batch, call.length, 0))):
            assert tuple(found[f"step{step}.{name}"].shape) == (batch, 1, *rest)


@calls_that(lambda call: any(name in arguments(call) for name in MASKS))
def test_every_row_is_padded_and_the_mask_matters(case: MatrixCase, call: Call) -> None:
    given = arguments(call)
    masks = {name: given[name] for name in MASKS if name in given}
    for mask in masks.values():
        lengths = mask.sum(dim=1)
        assert ((lengths > 0) & (lengths < mask.shape[1])).all()
        assert len(set(lengths.tolist())) > 1
    module = case.build()
    with torch.no_grad():
        masked = outputs(module(**given))
        for name in masks:
            whole = outputs(module(**{key: value for key, value in given.items() if key != name}))
            assert max(float((masked[key] - whole[key]).abs().max()) for key in masked) > 1e-2, name


@calls_that(lambda call: call.decode is not None)
def test_decoding_continues_the_prompt(case: MatrixCase, call: Call) -> None:
    assert call.decode is not None
    given, steps = arguments(call), call.decode.steps(call.batch, call.length, 0)
    tokens = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    whole = {**given, tokens: torch.cat([given[tokens], *(step[tokens] for step in steps)], dim=1), "use_cache": False}
    if "attention_mask" in steps[-1]:
        whole["attention_mask"] = steps[-1]["attention_mask"]
    module = case.build()
    with torch.no_grad():
        expected = outputs(module(**whole))["logits"][:, -len(steps) :]
    found = run_call(module, case, call)
    decoded = torch.cat([found[f"step{step}.logits"] for step in range(len(steps))], dim=1)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)


@calls_that(lambda call: True)
def test_plain_dynamo_is_equal_and_as_recorded(case: MatrixCase, call: Call) -> None:
    if reason := lost_by_dynamo(case):
        pytest.skip(reason)
    module = case.build()
    expected = run_call(module, case, call)
    trace = trace_call(module, case, call)
    assert_equal(trace.outputs, expected)
    assert trace.graphs > 0
    known = recorded()
    if known is not None:
        assert {"graphs": trace.graphs, "breaks": trace.breaks} == known[case.name][call.name], f"if right: {ACCEPT}"


def test_the_record_names_the_matrix() -> None:
    known = recorded()
    if known is None:
        pytest.skip(f"nothing recorded for torch {torch_minor()}: {ACCEPT}")
    assert {name: set(calls) for name, calls in known.items()} == {
        case.name: {call.name for call in case.calls} for case in cases()
    }, ACCEPT
    assert PATH.read_text() == render(json.loads(PATH.read_text())), f"edited by hand? {ACCEPT}"
