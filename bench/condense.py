"""Condense the tables of kernels to what the planner reads, and put them into the package.

The measured files hold every sample; the package ships a few numbers for each kernel (lowering/rates.json). Only the
family of CPUs that was measured is replaced, so that the tables of several machines can be collected in one file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import store
from bench.manifest import ROOT
from effcompile.core.errors import EffError, unknown
from effcompile.lowering import rates
from effcompile.lowering.rates import Curve

INSTALLED = ROOT / "lowering" / rates.FILE

TABLES = ("attention-table", "linear-table", "step-table", "moe-table")

Point = tuple[float, float]
"""Seconds of a call, and the seconds that its work takes at the machine's GEMM rate."""
Points = dict[tuple[int, int], Point]
"""By length and head dimension."""


def install_tables(names: Sequence[str], folder: Path, path: Path = INSTALLED) -> list[str]:
    """Put the stored tables of the named cases (none: all that have one) into the package and say what was done.

    Raises:
        EffError: EFF-B106 for results that cannot be read, EFF-B109 for those of several machines, EFF-B110 for a case
            that the planner does not read.
    """
    for name in names:
        if name not in TABLES:
            raise unknown("EFF-B110", "table", name, TABLES, hint="eff bench attention-table --install")
    lines = []
    for name, document in tables(names, folder):
        family, part = measured(document)
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"families": {}}
        told["families"].setdefault(family, {}).update(part)
        text = json.dumps({"schema": rates.SCHEMA, "families": told["families"]}, indent=1, sort_keys=True)
        path.write_text(_one_line_lists(text) + "\n", encoding="utf-8")
        lines.append(f"{name}: installed for {family}")
    return lines


def tables(names: Sequence[str], folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the stored tables of every machine, with their names; no names are all tables that there are.

    Raises:
        EffError: EFF-B106 where a name has none, or where there are none at all.
    """
    found = [(name, [store.read(path) for path in sorted(folder.glob(f"*/{name}.json"))]) for name in names or TABLES]
    missing = [name for name, documents in found if not documents]
    if missing if names else len(missing) == len(TABLES):
        raise EffError("EFF-B106", f"there are no results of {missing[0]} yet", hint=f"eff bench {missing[0]}")
    return [(name, document) for name, documents in found for document in documents]


def measured(document: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the family of the machine that a table was measured on, and what the package keeps of the table."""
    runs = document["runs"]
    date = max(runs)
    last = runs[date]
    machines = {(run["cpu"]["model"], run["cpu"]["isa"], run["threads"]) for run in runs.values()}
    if len(machines) != 1 or "family" not in last["cpu"] or last["threads"] != last["cpu"]["cores"]:
        raise EffError(
            "EFF-B109",
            "the rows of a table are to come from one machine, with a thread for every core",
            hint=f"eff bench {document['case']}",
        )
    about = f"{date[:10]}, {last['cpu']['model']}, {last['threads']} threads, torch {last['versions']['torch']}"
    if document["case"] == "linear-table":
        return last["cpu"]["family"], {"linear": condense_linear(document), "linear_about": about}
    if document["case"] == "step-table":
        return last["cpu"]["family"], {"few": condense_linear(document, "eff-rows"), "few_about": about}
    if document["case"] == "moe-table":
        return last["cpu"]["family"], {"experts": condense_experts(document), "experts_about": about}
    return last["cpu"]["family"], {"about": about, **condense(document, last["cpu"]["peaks"])}


def condense_linear(document: Mapping[str, Any], arm: str = "eff-linear") -> dict[str, Any]:
    """Return how many times as fast an arm's layer is as torch's own, by dtype and widths, at the measured numbers of rows."""
    found: dict[tuple[str, int, int], dict[int, float]] = {}
    for row in document["rows"]:
        at, arms = row["parameters"], row["arms"]
        if all("seconds" in arms[name] for name in ("aten", arm)):
            gain = arms["aten"]["seconds"]["median"] / arms[arm]["seconds"]["median"]
            found.setdefault((at["dtype"], at["in"], at["out"]), {})[at["length"]] = float(f"{gain:.3g}")
    return {
        " ".join(map(str, key)): {"rows": sorted(gains), "gains": [gains[rows] for rows in sorted(gains)]}
        for key, gains in sorted(found.items())
    }


def condense_experts(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the share of its roofline that each dispatch reached, by dtype and sizes, at the measured numbers of tokens.

    A dtype is left out unless the table has every arm's rows, or a reason for each that is missing: prices of some dispatches
    from the table and of others from a model would not compare.
    """
    found: dict[tuple[Any, ...], dict[int, float]] = {}
    broken = {row["parameters"]["dtype"] for row in document["rows"] for arm in row["arms"].values() if "error" in arm}
    for row in document["rows"]:
        at = row["parameters"]
        for name, arm in row["arms"].items():
            if "seconds" in arm and at["dtype"] not in broken:
                share = float(arm["roofline"]) / float(arm["seconds"]["median"])
                key = name, at["dtype"], at["experts"], at["top_k"], at["hidden"], at["inner"]
                found.setdefault(key, {})[at["length"]] = float(f"{share:.3g}")
    return {
        " ".join(map(str, key)): {"tokens": sorted(shares), "shares": [shares[n] for n in sorted(shares)]}
        for key, shares in sorted(found.items())
    }


def condense(document: Mapping[str, Any], peaks: Mapping[str, float]) -> dict[str, Any]:
    """Return the GEMM rates, as shares of the modelled peaks (FLOP/s by dtype), and the curve of every kernel."""
    found: dict[tuple[str, str, str], Points] = {}
    gemms: dict[str, list[float]] = {}
    for row in document["rows"]:
        at = row["parameters"]
        gemms.setdefault(at["dtype"], []).append(row["gemm_gflops"] * 1e9)
        for arm, measured in row["arms"].items():
            if "seconds" in measured:
                seconds = float(measured["seconds"]["median"])
                point = (seconds, seconds * float(measured["share_of_gemm"]))
                found.setdefault((arm, at["dtype"], at["mask"]), {})[at["length"], at["head_dim"]] = point
    curves = {" ".join(key): curve(points).to_json() for key, points in sorted(found.items())}
    gemm = {dtype: float(f"{median(values) / peaks[dtype]:.3g}") for dtype, values in sorted(gemms.items())}
    return {"gemm": gemm, "curves": curves}


def curve(points: Points) -> Curve:
    """Return the curve through the points of one kernel, with its error at lengths left out."""
    dims = [dim for _, dim in points]
    base = max(set(dims), key=lambda dim: (dims.count(dim), -dim))
    line = {length: point for (length, dim), point in sorted(points.items()) if dim == base}
    call = _call(list(line.values()))
    shares = {length: _share(point, call) for length, point in line.items()}
    factors = {base: 1.0}
    for (length, dim), point in points.items():
        if dim != base and length in shares:
            factors[dim] = _share(point, call) / shares[length]
    factors = dict(sorted(factors.items()))
    made = Curve(tuple(shares), tuple(shares.values()), tuple(factors), tuple(factors.values()), call, 0.0)
    return Curve(made.lengths, made.shares, made.head_dims, made.factors, call, _error(line, call))


def _share(point: Point, call: float) -> float:
    seconds, ideal = point
    return ideal / (seconds - call)


def _call(line: Sequence[Point]) -> float:
    """Return the seconds that do not go away with the work: the two shortest points have one share of the GEMM rate."""
    if len(line) < 2:
        return 0.0
    (short, less), (long, more) = line[0], line[1]
    if more <= less:
        return 0.0
    found = (short * more - long * less) / (more - less)
    return min(max(found, 0.0), 0.9 * min(seconds for seconds, _ in line))


def _error(line: Mapping[int, Point], call: float) -> float:
    """Return the relative RMS error of the times at inner lengths, each read from the curve through the others."""
    errors = []
    lengths = tuple(line)
    for left_out in lengths[1:-1]:
        others = tuple(length for length in lengths if length != left_out)
        share = rates.power_law(others, [_share(line[length], call) for length in others], left_out)
        seconds, ideal = line[left_out]
        errors.append((call + ideal / share) / seconds - 1)
    return math.sqrt(sum(error**2 for error in errors) / len(errors)) if errors else 0.0


def _one_line_lists(text: str) -> str:
    """Write lists of numbers on one line each, so that a difference of two tables can be read."""
    lines: list[str] = []
    for line in text.splitlines():
        inside = bool(lines) and lines[-1].count("[") > lines[-1].count("]")
        if inside:
            lines[-1] += ("" if lines[-1].endswith("[") or line.strip().startswith("]") else " ") + line.strip()
        else:
            lines.append(line)
    return "\n".join(lines)
