"""Turn the results of the case kv-decode into the tables of docs/kv_cache.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report import amount, chip, circumstances, replace_results
from effcompile.core.errors import EffError

PAGE = "kv_cache.md"
Arm = Mapping[str, Any]
_TITLES = {"speed": "Speed", "quality": "Quality", "evict": "Evictions", "generate": "Greedy tokens"}


def markdown(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return a table for each row, machine by machine."""
    parts = []
    for document in documents:
        chips = dict.fromkeys(chip(manifest) for manifest in document["runs"].values())
        parts += [f"### On {' and '.join(chips)}", document["about"]]
        for row in document["rows"]:
            given = row["parameters"]
            title = f"{_TITLES[given['form']]}, {given['length']:,} tokens, {given['dtype']}"
            parts.append(f"#### {title}\n\n{_table(row)}")
        parts.append("\n".join(f"measured: {text}  " for text in circumstances(document)))
    return "\n\n".join(parts)


def write(folder: Path, documents: Sequence[Mapping[str, Any]]) -> bool:
    """Put the tables between the markers of docs/kv_cache.md; return whether the page changed.

    Raises:
        EffError: EFF-B104 where the page or its markers are missing.
    """
    page = folder / PAGE
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise EffError("EFF-B104", f"cannot read {page.name}: {error.strerror}") from error
    new = replace_results(text, markdown(documents))
    if new != text:
        page.write_text(new, encoding="utf-8")
    return new != text


def _table(row: Mapping[str, Any]) -> str:
    """Return a line an arm that ran, with those columns that any arm has."""
    arms = {name: arm for name, arm in row["arms"].items() if "seconds" in arm}
    base = next(iter(row["arms"]))
    speed = {item["arm"]: item["median"] for item in row["ratios"] if item["to"] == base}
    columns: dict[str, Callable[[str, Arm], str | None]] = {
        "a token": lambda name, arm: amount("token", arm),
        f"against {base}": lambda name, arm: "1.00x" if name == base else _told(speed.get(name), "{:.2f}x"),
        "MB": lambda name, arm: _told(arm.get("bytes"), "{:.1f}", 1e-6),
        "bytes against bfloat16": lambda name, arm: _told(arm.get("bytes_ratio"), "{:.3f}"),
        "KL": lambda name, arm: _told(_quality(arm).get("kl"), "{:.4f}"),
        "top-1": lambda name, arm: _told(_quality(arm).get("top1"), "{:.1f} %", 100.0),
        "perplexity": lambda name, arm: _told(_quality(arm).get("perplexity"), "{:.2f}"),
        "prompts with equal tokens": lambda name, arm: _equal(arm.get("generate")),
    }
    shown = {title: [cell(name, arm) for name, arm in arms.items()] for title, cell in columns.items()}
    shown = {title: cells for title, cells in shown.items() if any(cells)}
    lines = ["| cache | " + " | ".join(shown) + " |", "| --- |" + " ---: |" * len(shown)]
    for place, (name, arm) in enumerate(arms.items()):
        label = f"`{arm['policy']}`" if arm.get("policy") else name
        lines.append("| " + " | ".join([label, *(cells[place] or "-" for cells in shown.values())]) + " |")
    return "\n".join(lines)


def _told(value: float | None, form: str, scale: float = 1.0) -> str | None:
    return None if value is None else form.format(value * scale)


def _quality(arm: Arm) -> Mapping[str, float]:
    found: Mapping[str, Mapping[str, float]] = arm.get("quality", {})
    return next(iter(found.values()), {})


def _equal(told: Mapping[str, Any] | None) -> str | None:
    return None if told is None else f"{told['equal_prompts']} of {told['prompts']}, {told['tokens']} tokens each"
