"""Translate an exported program to an ONNX file, the same bytes in every run, without paths of the machine in it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from effcompile.core.artifact import TensorInfo
from effcompile.core.errors import EffError

OPSET = 20
OPSETS = (18, 19, 20, 21, 22, 23)
FILE = "model.onnx"


def write_onnx(
    exported: torch.export.ExportedProgram, folder: Path, opset: int
) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """Write `model.onnx` and, beside it, its weights; return its inputs and outputs.

    Raises:
        EffError: EFF-E109 where torch's exporter cannot translate an operator, with its words.
    """
    with _quietly():
        try:
            made: Any = torch.onnx.export(exported, (), dynamo=True, opset_version=opset, optimize=True, verbose=False)
        except Exception as error:
            told = " ".join(str(error.__cause__ or error).split())[:400]
            raise EffError(
                "EFF-E109",
                f"ONNX has no form of this program: {type(error).__name__}: {told}",
                hint="another --opset may have one",
            ) from error
        _forget(made.model)
        made.save(str(folder / FILE), external_data=True)
    return tuple(map(_info, made.model.graph.inputs)), tuple(map(_info, made.model.graph.outputs))


def _info(value: Any) -> TensorInfo:
    return TensorInfo(
        str(value.name), str(value.dtype).lower().removeprefix("datatype."), tuple(_size(x) for x in value.shape or ())
    )


def _size(size: Any) -> int | str:
    text = str(getattr(size, "value", size))
    return int(text) if text.isdigit() else text


def _forget(model: Any) -> None:
    """Drop what the exporter notes of the source: stack traces, which hold paths, and names of modules."""
    model.metadata_props.clear()
    model.producer_version = None  # what made the file is in the manifest
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.outputs):
            value.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep back what torch's exporter says of its own parts: packages it misses, deprecations inside it."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
