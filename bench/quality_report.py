"""Turn the results of the case sparse-quality into the tables and the picture of docs/sparse_attention.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report import chip, circumstances, latest, write_page

CASES = ("sparse-quality",)
DENSE = "dense"
PICTURE = "sparse_attention.png"
_COLORS = ("#2f6fd6", "#e0a03c", "#5f9e6e", "#b0548c", "#7a6fd0", "#c4573d", "#3c9aa8", "#8a94a6")


_TITLES = {"text": "Text", "pass-key": "Pass key", "decode": "Decode"}
FORMS = tuple(_TITLES)


def rows_of(documents: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return (document, row) of the last run of each row, by form and length."""
    at = lambda pair: (FORMS.index(pair[1]["parameters"]["form"]), pair[1]["parameters"]["length"])  # noqa: E731
    return sorted(latest(documents), key=at)


def markdown(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return a table for each row, quality and speed side by side, with the chip that its last run was on."""
    rows = rows_of(documents)
    parts = [f"![speed against perplexity]({PICTURE})", rows[0][0]["about"]] if rows else []
    for document, row in rows:
        form = row["parameters"]["form"]
        made = {"text": _texts, "pass-key": _pass_keys, "decode": _steps}[form](row)
        size = f"{row['parameters']['length']:,} tokens, {row['parameters']['dtype']}"
        parts.append(f"### {_TITLES[form]}, {size}, {chip(document['runs'][row['run']])}\n\n{made}")
    used: dict[str, None] = {}
    for document, row in rows:
        runs = {row["run"]: document["runs"][row["run"]]}
        used.update(dict.fromkeys(circumstances({"runs": runs})))
    parts.append("\n".join(f"measured: {text}  " for text in used))
    return "\n\n".join(parts)


def write(folder: Path, documents: Sequence[Mapping[str, Any]]) -> bool:
    """Put the tables into docs/sparse_attention.md and draw the picture beside it; return whether the page changed.

    Raises:
        EffError: EFF-B104 where the page or its markers are missing.
    """
    return write_page(folder / "sparse_attention.md", markdown(documents), lambda: draw(documents, folder / PICTURE))


def _texts(row: Mapping[str, Any]) -> str:
    names = sorted({text for arm in row["arms"].values() for text in arm.get("quality", {})})
    heads = [f"{text}: {what}" for text in names for what in ("perplexity", "last 1,024", "KL", "top-1")]
    lines = [
        "| policy | run | speed | density | selector | of saved | " + " | ".join(heads) + " |",
        "| --- |" + " ---: |" * (5 + len(heads)),
    ]
    speed = {item["arm"]: item["median"] for item in row["ratios"] if item["to"] == DENSE}
    dense = row["arms"][DENSE].get("quality", {})
    for name, arm in row["arms"].items():
        if "seconds" not in arm:
            continue
        cells = [
            f"`{arm['policy'] or DENSE}`",
            f"{arm['seconds']['median']:.2f} s",
            f"{speed[name]:.2f}x" if name in speed else "1.00x" if name == DENSE else "-",
            f"{arm['density']:.3f}" if "density" in arm else "-",
            f"{100 * arm['selector_share']:.1f} %" if "selector_share" in arm else "-",
            f"{100 * arm['selector_of_saved']:.1f} %" if arm.get("selector_of_saved") else "-",
        ]
        for text in names:
            got, base = arm["quality"][text], dense[text]
            cells += [_against(got[key], base[key], name) for key in ("perplexity", "tail_perplexity")]
            cells += [f"{got['kl']:.4f}", f"{100 * got['top1']:.1f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _against(value: float, base: float, name: str) -> str:
    return f"{value:.2f}" if name == DENSE else f"{value:.2f} ({100 * (value / base - 1):+.1f} %)"


def _pass_keys(row: Mapping[str, Any]) -> str:
    tried = row.get("dense_found", {})
    parts = [f"{found} of {tries} at {int(length):,}" for length, (found, tries) in tried.items()]
    found_by = f"The dense model found {', '.join(parts)} tokens; a length is left as soon as too many are missed.\n\n"
    return (found_by if tried else "") + _pass_key_table(row)


def _pass_key_table(row: Mapping[str, Any]) -> str:
    lines = ["| policy | found |", "| --- | ---: |"]
    for arm in row["arms"].values():
        if "pass_key" in arm:
            found = arm["pass_key"]
            lines.append(f"| `{arm['policy'] or DENSE}` | {found['found']} of {found['tries']} |")
    return "\n".join(lines)


def _steps(row: Mapping[str, Any]) -> str:
    names = sorted({text for arm in row["arms"].values() for text in arm.get("quality", {})})
    heads = [f"{text}: {what}" for text in names for what in ("perplexity", "KL", "top-1")]
    lines = ["| policy | step | speed | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (2 + len(heads))]
    speed = {item["arm"]: item["median"] for item in row["ratios"] if item["to"] == DENSE}
    dense = row["arms"][DENSE]["quality"]
    for name, arm in row["arms"].items():
        if "seconds" not in arm:
            continue
        ratio = f"{speed[name]:.2f}x" if name in speed else "1.00x"
        cells = [f"`{arm['policy'] or DENSE}`", f"{1e3 * arm['seconds']['median']:.1f} ms", ratio]
        for text in names:
            got = arm["quality"][text]
            cells.append(_against(got["perplexity"], dense[text]["perplexity"], name))
            cells += [f"{got['kl']:.4f}", f"{100 * got['top1']:.1f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(documents: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw speed against the rise of perplexity, a panel a length, a color a policy; raises EFF-U104 without matplotlib."""
    from effcompile.models.trained import require

    require("matplotlib", "demo")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for _, row in rows_of(documents) if row["parameters"]["form"] == "text"]
    figure = Figure(figsize=(6.0 * max(1, len(rows)), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(rows)), squeeze=False)[0]
    for axes, row in zip(panels, rows):
        points = list(curve(row))
        kinds = list(dict.fromkeys(kind for kind, *_ in points))
        for kind, color in zip(kinds, _COLORS * (1 + len(kinds) // len(_COLORS))):
            mine = sorted((rise, speed, name) for this, name, rise, speed in points if this == kind)
            axes.plot([x for x, *_ in mine], [y for _, y, _ in mine], "o-", color=color, label=kind, lw=1.2, ms=5)
            for x, y, name in mine:
                axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=7, color="#444444")
        axes.axhline(1.0, color="#999999", lw=0.8, ls=":")
        axes.axvline(1.0, color="#999999", lw=0.8, ls=":")
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlabel("rise of perplexity over dense (%), the worse of both texts")
        axes.set_ylabel("run-level speed over dense")
        axes.set_title(
            f"SmolLM2-135M, {row['parameters']['length']:,} tokens, {row['parameters']['dtype']}", fontsize=10
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def curve(row: Mapping[str, Any]) -> list[tuple[str, str, float, float]]:
    """Return (policy, its parameters, rise of perplexity in percent, speed over dense) for each policy of a row."""
    speed = {item["arm"]: item["median"] for item in row["ratios"] if item["to"] == DENSE}
    dense = row["arms"][DENSE]["quality"]
    found = []
    for name, arm in row["arms"].items():
        if name == DENSE or "quality" not in arm:
            continue
        kind, _, given = arm["policy"].partition("{")
        rise = max(100 * (got["perplexity"] / dense[text]["perplexity"] - 1) for text, got in arm["quality"].items())
        found.append((kind, given.rstrip("}"), rise, speed[name]))
    return found
