"""Read and write the record of plain Dynamo's graphs, `tests/golden/matrix_dynamo.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).parents[2] / "golden" / "matrix_dynamo.json"

Counts = dict[str, dict[str, dict[str, int]]]


def torch_minor() -> str:
    """Return the key of this torch in the record, such as "2.13"."""
    return ".".join(torch.__version__.split(".")[:2])


def recorded(version: str | None = None) -> Counts | None:
    """Return case -> call -> {"graphs", "breaks"} for a torch version, or None where nothing is recorded."""
    return _read().get(version or torch_minor())


def accept(counts: Counts) -> bool:
    """Record `counts` for this torch, keep other versions, and tell whether the file changed."""
    everything = _read()
    everything[torch_minor()] = counts
    text = render(everything)
    if PATH.exists() and PATH.read_text() == text:
        return False
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(text)
    return True


def render(everything: Mapping[str, Counts]) -> str:
    """Return the file's text: one line a call, so that a change reads well in a diff."""
    blocks = []
    for version in sorted(everything):
        cases = []
        for case, calls in sorted(everything[version].items()):
            lines = ",\n".join(f"      {json.dumps(call)}: {json.dumps(calls[call])}" for call in sorted(calls))
            cases.append(f"    {json.dumps(case)}: {{\n{lines}\n    }}")
        blocks.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(cases) + "\n  }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def _read() -> dict[str, Any]:
    return dict(json.loads(PATH.read_text())) if PATH.exists() else {}
