"""Caches that are buffers: tokens are written where they belong, in one operator or in standard ones, into the caller's memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import effcompile as eff
from effcompile.codegen.onnx.generate import continuation
from effcompile.codegen.onnx.probe import Probe
from effcompile.core.errors import EffError
from effcompile.core.export_form import Dialect
from effcompile.core.rewrite import Editor, copy_graph
from effcompile.export_checks import compare_call
from effcompile.lowering.onnx.tensor_scatter import TensorScatter, open_writes
from tests.integrations.test_prepare import llama, words
from tests.lowering.onnx.test_forms import Called, places

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
HELD, NEW = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 2, 4)


def write(held: Tensor, new: Tensor, start: int = 5, dim: int = 2, step: int = 1) -> Tensor:
    """Write tokens into a buffer."""
    return torch.slice_scatter(held, new, dim, start, start + step * new.shape[dim], step)


def test_the_operator_writes_the_same() -> None:
    (place,) = places(TensorScatter(), Dialect(24), write, HELD, NEW)
    assert Probe(Dialect(24))(place) is None
    wrong = replace(place, sample=lambda: (HELD, NEW, torch.tensor([4, 5])), reference=lambda h, n, p: write(h, n))
    assert Probe(Dialect(24))(wrong) is not None


def test_what_is_left_alone() -> None:
    assert places(TensorScatter(), Dialect(23), write, HELD, NEW) == []
    assert (
        places(TensorScatter(), Dialect(24), lambda h, n: write(h + 1, n), HELD, NEW) == []
    )  # no buffer of the caller's
    assert places(TensorScatter(), Dialect(24), lambda h, n: write(h, n, 1, step=2), HELD, NEW) == []
    assert places(TensorScatter(), Dialect(24), lambda h, n: write(h, n, 1, 3), HELD, HELD[..., :2]) == []


def test_a_write_as_a_concatenation() -> None:
    exported = torch.export.export(Called(write), (HELD, NEW), strict=False)
    edit = Editor(copy_graph(exported.graph_module))
    open_writes(edit)
    module = edit.finish()
    assert not edit.graph.find_nodes(op="call_function", target=torch.ops.aten.slice_scatter.default)
    assert torch.equal(module(HELD, NEW)[0], write(HELD, NEW))


FORMS = [(24, "portable", "tensor-scatter"), (20, "portable", ""), (20, "ort", "group-query")]


@pytest.mark.parametrize(
    ("opset", "flavor", "form"), [FORMS[0], *(pytest.param(*form, marks=pytest.mark.slow) for form in FORMS[1:])]
)
def test_a_decoder_over_buffers(opset: int, flavor: str, form: str, tmp_path: Path) -> None:
    model: Any = llama(num_hidden_layers=1)
    made = eff.export(model, to="onnx", out=tmp_path / "a", opset=opset, flavor=flavor, buffers=True)
    told = dict(made.details)
    assert (form in told["forms"]) if form else ("tensor-scatter" not in told["forms"]), told
    assert max(check.error for check in made.checks) < 1e-5
    held = [tensor for tensor in made.inputs if tensor.name.startswith("past_key_values.")]
    assert {tensor.shape[2] for tensor in held} == {"max_sequence_length"}
    session = eff.load(tmp_path / "a")
    ids, total = words(1, 12), 12
    with torch.no_grad():
        wanted = model(ids).logits
    kept = {t.name: torch.full([1, int(t.shape[1]), 16, int(t.shape[3])], 7.0) for t in held}
    found = []
    for first, last in ((0, 5), *((n, n + 1) for n in range(5, total))):
        call = {"input_ids": ids[:, first:last], "attention_mask": torch.ones(1, last, dtype=torch.long), **kept}
        if "position_ids" in session.inputs:
            call["position_ids"] = torch.arange(first, last)[None]
        outputs = session(call)
        found.append(outputs["logits"])
        for name, value in kept.items():  # the caller's memory, which nothing was copied out of
            after = outputs[name.replace("past_key_values", "present")]
            assert after.data_ptr() == value.data_ptr()
            assert bool((value[:, :, last:] == 7.0).all())
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-4, atol=1e-4)
    errors = compare_call(session, made, model, (ids,), {})  # what `eff verify --model` does
    assert max(error for error, _ in errors.values()) < 1e-5
    text = ids[0].tolist()
    for token in continuation(session, made, ids[0].tolist(), 3):  # `eff run --text`
        with torch.no_grad():
            assert token == int(model(torch.tensor([text])).logits[0, -1].argmax())
        text.append(token)
    assert len(text) == total + 3


def test_what_has_no_buffers(tmp_path: Path) -> None:
    with pytest.raises(EffError, match="EFF-E118"):
        eff.export(
            llama(num_hidden_layers=1), to="onnx", out=tmp_path / "a", buffers=True, options={"kv": "static-channel"}
        )
    with pytest.raises(EffError, match="EFF-E117"):
        eff.export(torch.nn.Linear(2, 2), (torch.ones(2, 2),), to="onnx", out=tmp_path / "a", buffers=True)
