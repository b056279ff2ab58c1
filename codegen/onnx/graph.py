"""Translate an exported program to an ONNX file, the same bytes in every run, without paths of the machine in it."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effcompile.codegen.onnx.functions import inline
from effcompile.codegen.onnx.optimize import optimize
from effcompile.core.artifact import TensorInfo
from effcompile.core.emitter import Names
from effcompile.core.errors import EffError

OPSET = 20
OPSETS = (18, 19, 20, 21, 22, 23, 24)
FILE = "model.onnx"
PLAIN = Names()
_SUM = re.compile(r"\w+( \+ \w+)+")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class WrittenFile:
    """Hold inputs, outputs and the number of nodes of a file."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    nodes: int


def write_onnx(
    exported: torch.export.ExportedProgram,
    folder: Path,
    opset: int,
    functions: Sequence[str] = (),
    names: Names = PLAIN,
) -> WrittenFile:
    """Write `model.onnx` and, beside it, its weights; `functions` are the bodies of operators of ours in it.

    torch's own optimization is not asked for, since from opset 23 on it makes rotary embeddings of batch 1 that no other batch
    runs; the same rules without that one are run here.

    Raises:
        EffError: EFF-E109 where torch's exporter cannot translate an operator, with its words.
    """
    with _quietly():
        try:
            made: Any = torch.onnx.export(exported, (), dynamo=True, opset_version=opset, optimize=False, verbose=False)
        except Exception as error:
            told = " ".join(str(error.__cause__ or error).split())[:400]
            raise EffError(
                "EFF-E109",
                f"ONNX has no form of this program: {type(error).__name__}: {told}",
                hint="another --opset may have one",
            ) from error
        inline(made.model, functions)
        optimize(made.model)
        _call(made.model, names)
        _forget(made.model)
        made.save(str(folder / FILE), external_data=True)
    graph = made.model.graph
    nodes = sum(1 for _ in graph.all_nodes())
    return WrittenFile(tuple(map(_info, graph.inputs)), tuple(map(_info, graph.outputs)), nodes)


def _call(model: Any, names: Names) -> None:
    """Name inputs, outputs and sizes."""
    graph = model.graph
    for value, name in [*zip(graph.inputs, names.inputs), *zip(graph.outputs, names.outputs)]:
        value.name = name
    called: dict[str, str] = {}
    for value, sizes in zip(graph.inputs, names.sizes):
        for size, word in zip(value.shape, sizes):
            text = _size(size)
            if word is not None and isinstance(text, str) and text.isidentifier():
                called.setdefault(text, word)
    known = {word for value in graph.inputs for size in value.shape for word in _WORD.findall(str(_size(size)))}
    values = [*graph.inputs, *graph.outputs, *(value for node in graph.all_nodes() for value in node.outputs)]
    for value in {id(value): value for value in values}.values():
        if value.shape is not None:
            value.shape = type(value.shape)(_renamed(size, known, called) for size in value.shape)


def _renamed(size: Any, known: set[str], called: Mapping[str, str]) -> int | str | None:
    """Return a size by its name; one that no input has is unknown, since rules give one name to sizes that differ."""
    text = _size(size)
    if isinstance(text, int):
        return text
    words = _WORD.findall(text)
    if not words or not known.issuperset(words):
        return None
    named = _WORD.sub(lambda found: called.get(found.group(), found.group()), text)
    return " + ".join(sorted(named.split(" + "))) if _SUM.fullmatch(named) else named


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
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
