"""Draw the results: latency by length, compile time and peak memory, one color an arm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from effcompile.demo.results import TITLES, Cell, Results
from effcompile.models.trained import require

_COLORS = {"eager": "#8a94a6", "inductor": "#e0a03c", "eff": "#2f6fd6"}
_OTHER = "#5f9e6e"


def draw(results: Results, path: Path) -> None:
    """Write the picture as PNG; raises EFF-U104 without matplotlib."""
    require("matplotlib", "demo")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    _bars(left, results, "Prefill latency (s, median)", lambda cell: cell.latency, spread=True)
    _bars(middle, results, "Cold compile (s)", lambda cell: cell.compile_seconds or 0.0)
    _bars(right, results, "Peak memory of a prefill (GB)", lambda cell: cell.peak / 1e9)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    title = f"{results.model} on {results.machine['cpu']}, threads: {results.machine['threads']}"
    figure.suptitle(title + (" - noisy machine, see the report" if results.noise() else ""), fontsize=11)
    figure.savefig(path, dpi=130)


def _bars(axes: Any, results: Results, title: str, value: Callable[[Cell], float], spread: bool = False) -> None:
    width = 0.8 / len(results.arms)
    for number, arm in enumerate(results.arms):
        cells = [results.at(arm, length) for length in results.lengths]
        places = [place + (number - (len(results.arms) - 1) / 2) * width for place in range(len(cells))]
        heights = [value(cell) for cell in cells]
        error = [
            [h - min(c.seconds) for h, c in zip(heights, cells)],
            [max(c.seconds) - h for h, c in zip(heights, cells)],
        ]
        shown = axes.bar(
            places,
            heights,
            width * 0.92,
            color=_COLORS.get(arm, _OTHER),
            label=TITLES.get(arm, arm),
            yerr=error if spread else None,
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333333"},
        )
        axes.bar_label(shown, labels=[f"{height:.3g}" if height else "" for height in heights], fontsize=8, padding=2)
    axes.set_title(title, fontsize=10)
    axes.set_xticks(range(len(results.lengths)), [f"{length} tokens" for length in results.lengths])
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.15)
