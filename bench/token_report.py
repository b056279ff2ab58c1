"""Turn the results of the cases about fewer tokens into the tables and the picture of docs/tokens.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report import chip, circumstances, write_page

CASES = ("tokens-dinov2", "tokens-minilm", "tokens-smollm2")
PAGE = "tokens.md"
PICTURE = "tokens.png"
_COLORS = ("#2f6fd6", "#e0a03c", "#5f9e6e", "#b0548c")
Json = Mapping[str, Any]


def markdown(documents: Sequence[Json]) -> str:
    """Return a table for each row of the cases, machine by machine."""
    parts = [f"![speed against accuracy]({PICTURE})"] if panels(documents) else []
    for document in sorted(documents, key=lambda item: CASES.index(item["case"])):
        chips = dict.fromkeys(chip(manifest) for manifest in document["runs"].values())
        parts += [f"### {document['title']}, on {' and '.join(chips)}", document["about"]]
        for row in document["rows"]:
            given = row["parameters"]
            sizes = ", ".join(f"{key} {value}" for key, value in given.items())
            parts.append("  \n".join([f"{sizes}:", *row.get("notes", [])]))
            parts.append(_table(row))
        parts.append("\n".join(f"measured: {text}  " for text in circumstances(document)))
    return "\n\n".join(parts)


def write(folder: Path, documents: Sequence[Json]) -> bool:
    """Put the tables between the markers of docs/tokens.md and draw the picture; return whether the page changed.

    Raises:
        EffError: EFF-B104 where the page or its markers are missing.
    """
    return write_page(folder / PAGE, markdown(documents), lambda: draw(documents, folder / PICTURE))


def curve(row: Json) -> list[tuple[str, str, float, float, float, float]]:
    """Return (policy, its parameters, speed, points, lower and upper end of their interval) of each arm with a policy.

    Speed is over the arm `exact`.
    """
    speed = {item["arm"]: item["median"] for item in row["ratios"] if item["to"] == "exact"}
    found = []
    for name, arm in row["arms"].items():
        quality = arm.get("quality", {})
        if arm.get("policy") and "points" in quality and name in speed:
            kind, _, given = arm["policy"].partition("{")
            ends = quality["points_low"], quality["points_high"]
            found.append((kind, given.rstrip("}"), speed[name], quality["points"], *ends))
    return found


def panels(documents: Sequence[Json]) -> list[tuple[str, list[tuple[str, str, float, float, float, float]]]]:
    """Return (title, curve) of each row that has one."""
    found = []
    for document in documents:
        for row in document["rows"]:
            if points := curve(row):
                found.append((f"{document['title']}\n{chip(document['runs'][row['run']])}", points))
    return found


def draw(documents: Sequence[Json], path: Path) -> bool:
    """Draw accuracy against speed with intervals, a panel a row, a color a policy; return whether there was anything to draw.

    Raises:
        EffError: EFF-U104 without matplotlib.
    """
    from effcompile.models.trained import require

    require("matplotlib", "demo")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = panels(documents)
    if not shown:
        return False
    figure = Figure(figsize=(6.0 * len(shown), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, points) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        kinds = dict.fromkeys(kind for kind, *_ in points)
        for kind, color in zip(kinds, _COLORS):
            mine = sorted(point[1:] for point in points if point[0] == kind)
            mine.sort(key=lambda point: point[1])
            speeds, changes = [point[1] for point in mine], [point[2] for point in mine]
            spans = [[point[2] - point[3] for point in mine], [point[4] - point[2] for point in mine]]
            axes.errorbar(speeds, changes, yerr=spans, fmt="o-", color=color, label=kind, lw=1.2, ms=5, capsize=2)
            for given, speed, change, *_ in mine:
                label = given.partition(",")[0]
                axes.annotate(label, (speed, change), textcoords="offset points", xytext=(5, 4), fontsize=7)
        axes.axhline(0.0, color="#999999", lw=0.8, ls=":")
        axes.axhline(-1.0, color="#c4573d", lw=0.8, ls=":")
        axes.set_xlabel("run-level speed over the exact path")
        axes.set_ylabel("points of accuracy against the exact path, 95 % interval")
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    return True


def _table(row: Json) -> str:
    """Return a line an arm that ran, with the columns that any arm has; speed is over the exact arm, or the dense one."""
    arms = {name: arm for name, arm in row["arms"].items() if "seconds" in arm}
    base = next(name for name in ("exact", "dense", *arms) if name in arms)
    speed = {item["arm"]: item["median"] for item in row["ratios"] if item["to"] == base}
    cells = {name: _cells(name, arm, base, speed) for name, arm in arms.items()}
    heads = list(dict.fromkeys(head for found in cells.values() for head in found))
    lines = ["| policy | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for name, arm in arms.items():
        label = f"`{arm['policy']}`" if arm.get("policy") else name
        lines.append("| " + " | ".join([label, *(cells[name].get(head, "-") for head in heads)]) + " |")
    return "\n".join(lines)


def _cells(name: str, arm: Json, base: str, speed: Mapping[str, float]) -> dict[str, str]:
    cells = {}
    for key, head in (("images_per_second", "images/s"), ("texts_per_second", "texts/s")):
        if key in arm:
            cells[head] = f"{arm[key]:.1f}"
    if not cells:
        cells["run"] = f"{arm['seconds']['median']:.2f} s"
    cells[f"over {base}"] = "1.00x" if name == base else f"{speed[name]:.2f}x" if name in speed else "-"
    quality = arm.get("quality", {})
    if "accuracy" in quality:
        cells["accuracy"] = f"{100 * quality['accuracy']:.2f} %"
        ends = f"{quality['points_low']:+.2f} to {quality['points_high']:+.2f}"
        cells["points (95 %)"] = "-" if name == base else f"{quality['points']:+.2f} ({ends})"
        cells["cosine"] = f"{quality['cosine']:.4f}"
    if "cosine_5" in quality:
        cells["cosine, 5 % quantile"] = f"{quality['cosine_5']:.4f}"
    for text, score in quality.items():
        if isinstance(score, Mapping):
            cells[f"{text}: perplexity"] = f"{score['perplexity']:.2f}"
            cells[f"{text}: KL"] = f"{score['kl']:.4f}"
            cells[f"{text}: top-1"] = f"{100 * score['top1']:.1f} %"
    if "pass_key" in arm:
        cells["pass keys"] = f"{arm['pass_key']['found']} of {arm['pass_key']['tries']}"
    return cells
