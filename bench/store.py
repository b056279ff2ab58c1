"""Keep results: one JSON file a machine and case, rows replaced one by one, so that a long case can be run in parts and resumed.

Figures of different machines never meet in a file, for their rows would be read as comparable.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from effcompile.core.errors import EffError

SCHEMA = 1
_SPREAD = {"median": (int, float), "min": (int, float), "max": (int, float), "iqr": (int, float), "samples": list}
_ROW = {"id": str, "parameters": dict, "rounds": int, "arms": dict, "ratios": list, "run": str}
_MANIFEST = {
    "date": str,
    "versions": dict,
    "cpu": dict,
    "threads": int,
    "memory_bytes": int,
    "commit": dict,
    "command": str,
    "environment": dict,
    "settings": dict,
    "load": list,
}


def path_of(folder: Path, machine: str, case: str) -> Path:
    """Return the file of a case as measured on a machine: a family of CPUs, or a GPU (`manifest.machine_name`)."""
    return folder / machine / f"{case}.json"


def empty(
    case: str, title: str, about: str, unit: str, device: str, machine: str, *, headline: bool = True
) -> dict[str, Any]:
    """Return a document without rows."""
    return {
        "schema": SCHEMA,
        "case": case,
        "title": title,
        "about": about,
        "unit": unit,
        "device": device,
        "machine": machine,
        "tag": "measured",
        "headline": headline,
        "runs": {},
        "rows": [],
    }


def merge(
    document: Mapping[str, Any],
    manifest: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    order: Sequence[str] = (),
    *,
    add_arms: bool = False,
) -> dict[str, Any]:
    """Return the document with the rows of one run: a row of the same id is replaced, manifests without rows go.

    Rows stand in the given order of ids, others after them in the order in which they were measured first. With `add_arms` a row
    keeps the arms that were not measured anew; those that were name their run: its date, and a number where another command began
    in the same second.
    """
    run = date = str(manifest["date"])
    number = 2
    while document["runs"].get(run, manifest)["command"] != manifest["command"]:
        run, number = f"{date} {number}", number + 1
    new = {row["id"]: {**row, "run": run} for row in rows}
    if add_arms:
        new |= {row["id"]: _with_arms(row, new[row["id"]]) for row in document["rows"] if row["id"] in new}
    kept = [new.pop(row["id"], row) for row in document["rows"]] + list(new.values())
    places = {name: place for place, name in enumerate(order)}
    kept.sort(key=lambda row: places.get(row["id"], len(places)))
    runs = {**document["runs"], run: dict(manifest)}
    used = {row["run"] for row in kept}
    used |= {part.get("run") for row in kept for part in (*row["arms"].values(), *row["ratios"])}
    return {**document, "runs": {name: runs[name] for name in runs if name in used}, "rows": kept}


def _with_arms(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the arms of both, and the ratios of each to the arms that ran beside it.

    A ratio is of two arms that took turns, so it goes once its arm was measured anew; where only the arm that it is `to` was, as
    the baseline of every part of a long row is, it stays and names its run. Where no arm of old is left, the row is the new one.
    """
    if set(old["arms"]) <= set(new["arms"]):
        return dict(new)
    arms = {name: {**arm, "run": new["run"]} for name, arm in new["arms"].items()}
    ratios = [item for item in old["ratios"] if item["arm"] not in arms]
    kept = [{"run": old["run"], **item} if item["to"] in arms else item for item in ratios]
    fresh = [{**item, "run": new["run"]} for item in new["ratios"]]
    return {**old, "arms": {**old["arms"], **arms}, "ratios": [*kept, *fresh]}


def read(path: Path) -> dict[str, Any]:
    """Read and check a result file.

    Raises:
        EffError: EFF-B106 when it cannot be read or does not have the form.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EffError("EFF-B106", f"cannot read the results {path.name}: {error}", hint="eff bench") from error
    if problems := check(document):
        raise EffError(
            "EFF-B106", f"{path.name} is no result file: {problems[0]}", hint=f"remove {path.name} and run eff bench"
        )
    return dict(document)


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a result file at once: a run that is stopped leaves the old file or the new one."""
    problems = check(document)
    assert not problems, problems[:3]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".json.part")
    scratch.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def check(document: Any) -> list[str]:
    """Return what is wrong with a result document; nothing for a good one."""
    if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
        return [f"its schema is not {SCHEMA}"]
    problems = [
        f"no `{key}`"
        for key in ("case", "title", "about", "unit", "device", "machine", "tag", "headline", "runs", "rows")
        if key not in document
    ]
    if problems:
        return problems
    for run, manifest in document["runs"].items():
        problems += _fields(manifest, _MANIFEST, f"run {run}")
    seen = set()
    for row in document["rows"]:
        problems += (wrong := _fields(row, _ROW, f"row {row.get('id')}"))
        if wrong:
            continue
        if row["id"] in seen:
            problems.append(f"row {row['id']} twice")
        seen.add(row["id"])
        if row["run"] not in document["runs"]:
            problems.append(f"row {row['id']} has no manifest")
        problems += _check_arms(row)
    return problems


def _check_arms(row: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, arm in row["arms"].items():
        place = f"row {row['id']} arm {name}"
        if not isinstance(arm, Mapping):
            problems.append(f"{place} is not an object")
        elif not {"seconds", "bytes", "error", "skipped"} & set(arm):
            problems.append(f"{place} has neither a measurement nor a reason")
        elif "seconds" in arm:
            problems += _fields(arm["seconds"], _SPREAD, place)
    for item in row["ratios"]:
        problems += _fields(item, {"arm": str, "to": str, **_SPREAD}, f"row {row['id']} ratio")
    return problems


def _fields(value: Any, wanted: Mapping[str, Any], place: str) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"{place} is not an object"]
    return [
        f"{place}: `{key}` is missing or has the wrong type"
        for key, kind in wanted.items()
        if not isinstance(value.get(key), kind)
    ]
