"""Turn the results of the cases about adaptive models into the tables of docs/adaptive.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report import section, write_page

CASES = ("recursions", "codebook")


def markdown(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return a table a case and machine."""
    ordered = sorted(documents, key=lambda document: CASES.index(document["case"]))
    return "\n\n".join(section(document) for document in ordered)


def write(folder: Path, documents: Sequence[Mapping[str, Any]]) -> bool:
    """Put the tables into docs/adaptive.md; return whether the page changed.

    Raises:
        EffError: EFF-B104 where the page or its markers are missing.
    """
    return write_page(folder / "adaptive.md", markdown(documents))
