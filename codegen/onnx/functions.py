"""Add functions of our own to an ONNX model, and inline them: what is written holds operators of the runtime alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effcompile.core.export_form import OWN


def parsed(body: str) -> Any:
    """Return the ONNX function of a text; a text that is none is our own fault."""
    import onnx.parser

    return onnx.parser.parse_function(body)


def inline(model: Any, bodies: Sequence[str]) -> None:
    """Put functions into a model (onnx_ir) and every call of one into its place."""
    import onnx_ir as ir
    from onnx_ir.passes.common import InlinePass

    if not bodies:
        return
    for body in bodies:
        made = ir.serde.deserialize_function(parsed(body))
        model.functions[made.identifier()] = made
    model.opset_imports[OWN] = 1
    InlinePass()(model)
    model.opset_imports.pop(OWN, None)
