"""Turn the results of the cases moe, moe-memory, versatile and duo into the tables of docs/experts.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report import amount, chip, circumstances, latest, versus_best, write_page

CASES = ("moe", "moe-memory", "versatile", "duo")
OURS = "eff"
Document = Mapping[str, Any]
Row = Mapping[str, Any]


def markdown(documents: Sequence[Document]) -> str:
    """Return the tables of each case, a part for each chip and dtype."""
    parts: list[str] = []
    for case in CASES:
        groups: dict[tuple[str, str], list[tuple[Document, Row]]] = {}
        found = latest([document for document in documents if document["case"] == case])
        at = lambda pair: (-len(pair[1]["parameters"]["dtype"]), pair[1]["parameters"]["length"])  # noqa: E731
        for document, row in sorted(found, key=at):
            key = row["parameters"]["dtype"], chip(document["runs"][row["run"]])
            groups.setdefault(key, []).append((document, row))
        for number, ((dtype, machine), pairs) in enumerate(groups.items()):
            document = pairs[-1][0]
            if not number:
                parts += [f"### {document['title']}", document["about"]]
            rows = [row for _, row in pairs]
            made = _speeds(rows) if case == "moe" else _arms(document, rows)
            runs = {row["run"]: of["runs"][row["run"]] for of, row in pairs}
            measured = "\n".join(f"measured: {text}  " for text in circumstances({"runs": runs}))
            parts.append(f"#### {dtype}, {machine}\n\n{made}\n\n{measured}")
    return "\n\n".join(parts)


def write(folder: Path, documents: Sequence[Document]) -> bool:
    """Put the tables into docs/experts.md; return whether the page changed.

    Raises:
        EffError: EFF-B104 where the page or its markers are missing.
    """
    return write_page(folder / "experts.md", markdown(documents))


def _speeds(rows: Sequence[Row]) -> str:
    """Return a line a block: ours, the fastest of the others, and how far the limit is."""
    heads = ("block", "tokens", "eff", "fastest other", "against it", "share of GEMM rate", "times a copy")
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    won, counted = 0, 0
    for row in rows:
        arms = {name: arm for name, arm in row["arms"].items() if "seconds" in arm}
        if OURS not in arms:
            continue
        others = {name: arm["seconds"]["median"] for name, arm in arms.items() if not name.startswith(OURS)}
        best = min(others, key=lambda name: others[name])
        ratio = next(item for item in row["ratios"] if item["arm"] == OURS and item["to"] == best)["median"]
        counted += 1
        won += ratio >= 1.2
        few = "times_copy" in arms[OURS]
        cells = [
            str(row["parameters"]["form"]),
            f"{row['parameters']['length']:,}",
            _time(arms[OURS]["seconds"]["median"]),
            f"{_time(others[best])} {best}",
            f"{ratio:.2f}x",
            "" if few else f"{100 * arms[OURS]['share_of_gemm']:.0f} %",
            f"{arms[OURS]['times_copy']:.2f}" if few else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"1.2x or more of the fastest other in {won} of {counted} rows."])


def _arms(document: Document, rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["arms"]))
    lines = ["| row | " + " | ".join((*names, "against the fastest other")) + " |"]
    lines.append("| --- |" + " ---: |" * (len(names) + 1))
    for row in rows:
        cells = [_amount(document, row["arms"].get(name, {})) for name in names]
        lines.append("| " + " | ".join([row["id"], *cells, versus_best(row)]) + " |")
    return "\n".join(lines)


def _amount(document: Document, arm: Mapping[str, Any]) -> str:
    if "seconds" in arm:
        return _time(arm["seconds"]["median"])
    return amount(document["unit"], arm) if "bytes" in arm else "-"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"
