"""Turn the results of the case kv-decode into the tables of docs/kv_cache.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report import amount, chip, circumstances, write_page

CASES = ("kv-decode",)
PAGE = "kv_cache.md"
PICTURE = "kv_cache.png"
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
    if any(curve(document["rows"]) for document in documents):
        parts.append(f"![KL against bytes, with the speed of each arm]({PICTURE})")
    return "\n\n".join(parts)


def write(folder: Path, documents: Sequence[Mapping[str, Any]]) -> bool:
    """Put the tables between the markers of docs/kv_cache.md; return whether the page changed.

    Raises:
        EffError: EFF-B104 where the page or its markers are missing.
    """
    return write_page(folder / PAGE, markdown(documents), lambda: draw(documents, folder / PICTURE))


def curve(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float, float]]:
    """Return (arm, bytes against bfloat16, KL, speed) of every arm with a quality; speed is over the first arm of the form `speed`.

    Where an arm has no speed, as evictions have none, that is NaN. Of rows of one form the last one counts.
    """
    by_form = {row["parameters"]["form"]: row for row in rows}
    base = next(iter(by_form["speed"]["arms"])) if "speed" in by_form else ""
    speed = {
        item["arm"]: item["median"] for item in by_form.get("speed", {"ratios": ()})["ratios"] if item["to"] == base
    }
    found = []
    for form in ("quality", "evict"):
        for name, arm in by_form.get(form, {"arms": {}})["arms"].items():
            quality = _quality(arm)
            if "kl" in quality and "bytes_ratio" in arm:
                found.append((name, float(arm["bytes_ratio"]), quality["kl"], speed.get(name, math.nan)))
    return found


def draw(documents: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw KL against bytes, a point an arm whose area is its speed, a panel a machine; return whether there was anything to draw.

    Raises:
        EffError: EFF-U104 without matplotlib.
    """
    from effcompile.models.trained import require

    require("matplotlib", "demo")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(document, points) for document in documents if (points := curve(document["rows"]))]
    if not panels:
        return False
    figure = Figure(figsize=(6.4 * len(panels), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (document, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name, size, loss, speed in points:
            known = not math.isnan(speed)
            area, color = (40 * max(speed, 0.2), "#1f77b4") if known else (30, "#999999")
            axes.scatter([size], [max(loss, 1e-6)], s=area, color=color, alpha=0.7)
            label = f"{name} {speed:.1f}x" if known else name
            axes.annotate(label, (size, max(loss, 1e-6)), textcoords="offset points", xytext=(6, 4), fontsize=7)
        axes.set_yscale("log")
        axes.set_xlabel("bytes of the cache against bfloat16")
        axes.set_ylabel("KL against the model's own cache")
        axes.set_title(
            f"SmolLM2-135M on {', '.join(dict.fromkeys(chip(m) for m in document['runs'].values()))}", fontsize=9
        )
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return True


def _table(row: Mapping[str, Any]) -> str:
    """Return a line an arm that ran, with those columns that any arm has; times of the form that is about them alone."""
    arms = {name: arm for name, arm in row["arms"].items() if "seconds" in arm}
    base = next(iter(row["arms"]))
    speed = {item["arm"]: item["median"] for item in row["ratios"] if item["to"] == base}
    times: dict[str, Callable[[str, Arm], str | None]] = {
        "a token": lambda name, arm: amount("token", arm),
        f"against {base}": lambda name, arm: "1.00x" if speed and name == base else _told(speed.get(name), "{:.2f}x"),
    }
    columns: dict[str, Callable[[str, Arm], str | None]] = {
        **(times if row["parameters"]["form"] == "speed" else {}),
        "MB": lambda name, arm: _told(arm.get("bytes"), "{:.1f}", 1e-6),
        "bytes against bfloat16": lambda name, arm: _told(arm.get("bytes_ratio"), "{:.3f}"),
        "KL": lambda name, arm: _told(_quality(arm).get("kl"), "{:.4f}"),
        "top-1": lambda name, arm: _told(_quality(arm).get("top1"), "{:.1f} %", 100.0),
        "perplexity": lambda name, arm: _told(_quality(arm).get("perplexity"), "{:.2f}"),
        "pass keys": lambda name, arm: _keys(arm.get("pass_key")),
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


def _keys(told: Mapping[str, Any] | None) -> str | None:
    return None if told is None else f"{told['found']} of {told['tries']} (whole: {told['dense']})"


def _equal(told: Mapping[str, Any] | None) -> str | None:
    return None if told is None else f"{told['equal_prompts']} of {told['prompts']}, {told['tokens']} tokens each"
