"""Turn the results of the case schedules into the tables and the picture of docs/diffusion.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.frechet import interval
from bench.report import circumstances, write_page
from bench.schedule_arms import BASELINE

CASES = ("schedules",)
PAGE = "diffusion.md"
PICTURE = "diffusion.png"
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """Hold an arm on the frontier: how many times as fast as the baseline, distances by seed, and against plain steps.

    `excess` are its distances less those that plain steps have at the same time, one a seed that both have.
    """

    name: str
    policy: str
    plain: bool
    speed: float
    distances: tuple[float, ...]
    at_equal_time: float
    excess: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Return the mean distance."""
        return interval(self.distances)[0]

    @property
    def half(self) -> float:
        """Return half of the 95 % interval of the mean distance over the seeds."""
        return interval(self.distances)[1]

    @property
    def no_worse(self) -> bool:
        """Tell whether the mean is no larger than that of plain steps of the same time."""
        return bool(self.excess) and interval(self.excess)[0] <= 0


def at_speed(plain: Sequence[tuple[float, float]], speed: float) -> float:
    """Return the distance that plain steps have at a speed, from (speed, distance) of some, linear in the logarithm of speed."""
    ordered = sorted(plain)
    if speed <= ordered[0][0]:
        return ordered[0][1]
    for (slow, better), (fast, worse) in pairwise(ordered):
        if speed <= fast:
            return better + math.log(speed / slow) / math.log(fast / slow) * (worse - better)
    return ordered[-1][1]


def frontier(document: Json, model: str) -> list[Point]:
    """Return the arms of a model that were both timed and sampled, by their speed."""
    rows = {row["id"]: row for row in document["rows"]}
    timed = rows.get(f"times-{model}")
    seeds = [row for row in document["rows"] if row["parameters"]["form"] == f"quality-{model}"]
    if timed is None or not seeds:
        return []
    speeds = {BASELINE: 1.0}
    speeds |= {item["arm"]: item["median"] for item in timed["ratios"] if item["to"] == BASELINE}
    found = []
    for name, arm in timed["arms"].items():
        mine = [row["arms"][name]["frechet"] for row in seeds if "frechet" in row["arms"].get(name, {})]
        if not mine or name not in speeds:
            continue
        pairs = [(row["arms"][name]["frechet"], curve) for row in seeds if (curve := _plain(row, speeds, name))]
        plain = [at_speed(curve, speeds[name]) for _, curve in pairs]
        excess = tuple(value - other for (value, _), other in zip(pairs, plain))
        equal = sum(plain) / len(plain) if plain else math.nan
        found.append(Point(name, arm["policy"], arm["plain"], speeds[name], tuple(mine), equal, excess))
    return sorted(found, key=lambda point: point.speed)


def _plain(row: Json, speeds: Mapping[str, float], name: str) -> list[tuple[float, float]]:
    """Return (speed, distance) of the plain arms of a seed that also has the arm; nothing where it has not."""
    if "frechet" not in row["arms"].get(name, {}):
        return []
    return [
        (speeds[other], arm["frechet"]) for other, arm in row["arms"].items() if arm.get("plain") and other in speeds
    ]


def markdown(documents: Sequence[Json]) -> str:
    """Return the frontier of each model, the estimates and the replayed attention, of the machines that have some."""
    parts = [f"![distance against speed]({PICTURE})"] if any(_points(document) for document in documents) else []
    parts += [documents[0]["about"]] if documents else []
    for document in documents:
        told = len(parts)
        for model, points in _points(document).items():
            samples = {row["parameters"]["samples"] for row in document["rows"] if row["parameters"].get("samples")}
            real = next(row["real"] for row in document["rows"] if row["parameters"]["form"] == f"quality-{model}")
            parts.append(
                f"### {_heading(documents, document, model)}: {max(samples):,} samples a seed\n\n"
                f"Digits that were held out are at {real:.3f}.\n\n{_table(points)}"
            )
        parts += [_estimates(row) for row in document["rows"] if row["parameters"]["form"].startswith("estimate")]
        parts += [_replay(row) for row in document["rows"] if row["parameters"]["form"] == "replay"]
        if len(parts) > told:
            parts.append("\n".join(f"measured: {text}  " for text in circumstances(document)))
    return "\n\n".join(parts)


def _points(document: Json) -> dict[str, list[Point]]:
    return {model: points for model in ("8", "32") if (points := frontier(document, model))}


def _heading(documents: Sequence[Json], document: Json, model: str) -> str:
    """Name the digits, and the machine where more than one has drawn such."""
    alike = sum(model in _points(other) for other in documents)
    return f"Digits of {model} x {model}" + (f" on {document['machine']}" if alike > 1 else "")


def _table(points: Sequence[Point]) -> str:
    lines = ["| policies | speed | seeds | distance | plain steps at equal time | difference (95 %) |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for point in points:
        cells = [f"`{point.policy}`", f"{point.speed:.2f}x", str(len(point.distances))]
        cells.append(_with_half(point.mean, point.half, ""))
        if point.plain or not point.excess:
            cells += ["-", "-"]
        else:
            mean, half = interval(point.excess)
            cells += [f"{point.at_equal_time:.3f}", _with_half(mean, half, "+")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _with_half(mean: float, half: float, sign: str) -> str:
    """Return a mean with half of its interval, which one seed does not give."""
    return f"{mean:{sign}.3f}" + ("" if math.isinf(half) else f" ± {half:.3f}")


def _estimates(row: Json) -> str:
    title = row["parameters"]["form"].partition("-")[2]
    lines = [f"### Wall time over `estimate()`: {title}, {row['scaled']}", ""]
    lines += ["| policies | run | over estimate(seconds) | over estimate() |", "| --- | ---: | ---: | ---: |"]
    for arm in row["arms"].values():
        over = arm["over_estimate"]
        ratios = [f"{over[tag]['median']:.3f}" for tag in ("measured", "modelled")]
        lines.append(f"| `{arm['policy']}` | {arm['seconds']['median']:.2f} s | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def _replay(row: Json) -> str:
    arm = row["arms"]["re-ttention"]
    pairs, blocks = (f"{arm['ceiling'][tag]:.3f} (d = {arm['density'][tag]:.3f})" for tag in ("pairs", "blocks"))
    once = {tag: 0.44 + 0.56 * density for tag, density in arm["density"].items()}
    return (
        f"### Attention of a run, `{arm['policy']}`\n\nIt takes {arm['share']['median']:.3f} of the time of dense attention. The "
        f"schedule allows 0.44 + 0.70 d: {pairs} by pairs, {blocks} by the blocks that the kernel visits. With each pair once in a "
        f"refresh, as on CPU, it is 0.44 + 0.56 d: {once['pairs']:.3f} and {once['blocks']:.3f}."
    )


def write(folder: Path, documents: Sequence[Json]) -> bool:
    """Put the tables between the markers of docs/diffusion.md and draw the picture; return whether the page changed.

    Raises:
        EffError: EFF-B104 where the page or its markers are missing.
    """
    return write_page(folder / PAGE, markdown(documents), lambda: draw(documents, folder / PICTURE))


def draw(documents: Sequence[Json], path: Path) -> bool:
    """Draw distance against speed, with intervals from three seeds on, a panel a model; return whether there was anything to draw.

    Raises:
        EffError: EFF-U104 without matplotlib.
    """
    from effcompile.models.trained import require

    require("matplotlib", "demo")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (_heading(documents, document, model), points)
        for document in documents
        for model, points in _points(document).items()
    ]
    if not panels:
        return False
    figure = Figure(figsize=(6.0 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (heading, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for plain, color, label in ((True, "#8a94a6", "plain steps"), (False, "#2f6fd6", "schedules and caches")):
            mine = [point for point in points if point.plain == plain]
            # That of two seeds reaches 9 deviations to each side: it would hide the others, and stands in the table.
            spans = [point.half if len(point.distances) > 2 else 0.0 for point in mine]
            style = "o-" if plain else "o"
            speeds, means = [point.speed for point in mine], [point.mean for point in mine]
            axes.errorbar(speeds, means, yerr=spans, fmt=style, color=color, label=label, lw=1.2, ms=4, capsize=2)
        for point in points:
            axes.annotate(point.name, (point.speed, point.mean), textcoords="offset points", xytext=(4, 4), fontsize=6)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
        axes.set_xlabel("times as fast as 28 Euler steps")
        axes.set_ylabel("Frechet distance to the digits of training")
        axes.set_title(heading, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    return True
