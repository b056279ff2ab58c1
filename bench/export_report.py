"""Turn the results of the cases onnx-export and builds into the tables of docs/export.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report import circumstances, latest, section, write_page

CASES = ("onnx-export", "builds")
Json = Mapping[str, Any]


def markdown(documents: Sequence[Json]) -> str:
    """Return the speeds in ONNX Runtime, machine by machine, and the last build of everything."""
    parts = [section(document) for document in documents if document["case"] == "onnx-export"]
    built = latest([document for document in documents if document["case"] == "builds"])
    if built:
        document = built[-1][0]
        runs = {row["run"]: of["runs"][row["run"]] for of, row in built}
        parts += [f"### {document['title']}", document["about"], _builds([row for _, row in built])]
        parts.append("\n".join(f"measured: {text}  " for text in circumstances({"runs": runs})))
    return "\n\n".join(parts)


def write(folder: Path, documents: Sequence[Json]) -> bool:
    """Put the tables into docs/export.md; return whether the page changed.

    Raises:
        EffError: EFF-B104 where the page or its markers are missing.
    """
    return write_page(folder / "export.md", markdown(documents))


def _builds(rows: Sequence[Json]) -> str:
    heads = ("what", "dtype", "first", "again", "engine alone", "holds", "the same bytes", "attention")
    lines = ["| " + " | ".join(heads) + " |", "| --- | --- |" + " ---: |" * 3 + " --- | --- | --- |"]
    for row in rows:
        first, again = row["arms"]["first"], row["arms"]["again"]
        engine = f"{first['engine_seconds']:.0f} s" if "engine_seconds" in first else "-"
        holds = f"{first['engine_bytes'] / 1e6:.0f} MB" if "engine_bytes" in first else f"{first['binaries']} binaries"
        same = {True: "yes", False: "no"}.get(again.get("same_bytes"), "-")
        times = [f"{arm['seconds']['median']:.0f} s" for arm in (first, again)]
        given = row["parameters"]
        cells = (given["form"], given["dtype"], *times, engine, holds, same, first.get("attention", "-"))
        lines.append("| " + " | ".join(cells) + " |")
    whole = sum(row["arms"]["first"]["seconds"]["median"] for row in rows if row["parameters"]["form"] != "triton")
    return "\n".join([*lines, "", f"All models together, first builds: {whole:.0f} s."])
