"""Export every model to ONNX, have ONNX Runtime give eager's numbers, and write what came of it as a table.

`python -m tests.support.export_coverage --accept [CASE...]` writes tests/golden/export_coverage.json and docs/export_coverage.md;
without `--accept` it prints a line for each and exits 1 where one fails that did not fail before. With `--rtx` the builder of
TensorRT-RTX gets every file too, for each of its chips.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import effcompile as eff
from effcompile.codegen.emitters.tensorrt_rtx import CHIPS
from effcompile.codegen.tensorrt.child import build
from effcompile.codegen.tensorrt.profiles import profiles
from effcompile.core.artifact import Manifest
from effcompile.core.errors import EffError
from tests.support.export_cases import ExportCase, export_cases

ROOT = Path(__file__).parents[2]
GOLDEN, PAGE = ROOT / "tests" / "golden" / "export_coverage.json", ROOT / "docs" / "export_coverage.md"
TURING = "sm_75"
Row = dict[str, Any]


def exported(case: ExportCase, out: Path, opset: int = 20, flavor: str = "portable", rtx: bool = False) -> Row:
    """Export one case and return its row; what failed is in `failed`, and with `rtx` what became of engines in `rtx`."""
    begun = time.perf_counter()
    kwargs = None if case.call is None else case.call()
    row: Row = {"family": case.family, "cache": case.call is None, "opset": opset, "flavor": flavor}
    try:
        made = eff.export(
            case.build(), (), kwargs or {}, to="onnx", out=out, opset=opset, flavor=flavor, cache=case.call is None
        )
    except EffError as error:
        return {**row, "failed": " ".join(str(error).split())[:300], "seconds": round(time.perf_counter() - begun, 1)}
    details, seconds = dict(made.details), time.perf_counter() - begun
    return {
        **row,
        "nodes": int(details["nodes"]),
        "sites": len(made.sites),
        "forms": details["forms"],
        "points": len({check.sizes for check in made.checks}),
        "error": max(check.error for check in made.checks),
        "seconds": round(seconds, 1),
        **({"rtx": engines(made, out)} if rtx else {}),
    }


def engines(made: Manifest, folder: Path) -> dict[str, str]:
    """Return for every chip of TensorRT-RTX whether it builds an engine of an export: `yes`, or the error."""
    shapes = profiles(made.inputs, dict(made.checks[0].sizes), (), "")
    found = {}
    for chip in CHIPS:
        job = {
            "onnx": str(folder / "model.onnx"), "engine": str(folder.parent / "engine"), "profiles": shapes,
            "chips": [chip.replace("_", "").upper()],
        }  # fmt: skip
        try:
            build(job, 120.0)
            found[chip] = "yes"
        except EffError as error:
            found[chip] = " ".join(str(error).split())[:200]
    return found


def _built(row: Row) -> str:
    """Return the chips that have an engine, and why the others have none."""
    found = row.get("rtx")
    if found is None:
        return "-"
    good = [chip for chip, told in found.items() if told == "yes"]
    chips = ", ".join(chip.removeprefix("sm_") for chip in good) or "none"
    told = (text for chip, text in found.items() if text != "yes" and chip != TURING)
    left = sorted({re.sub(r" for SM\d+", "", text).strip() for text in told})
    return "; ".join([chips, *(text.replace("|", "or") for text in left)])


def recorded() -> dict[str, Row]:
    """Return the rows as committed."""
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def page(rows: dict[str, Row]) -> str:
    """Return the table as Markdown."""
    good = [row for row in rows.values() if "failed" not in row]
    counts = {
        family: sum(row["family"] == family for row in good) for family in dict.fromkeys(r["family"] for r in good)
    }
    told = ", ".join(f"{n} {family}" for family, n in counts.items())
    lines = [
        "# Exports to ONNX",
        "",
        "Unmodified transformers 5.23 and diffusers 0.42 classes with random weights, exported by `eff.export` and run by ONNX",
        "Runtime on a CPU. `points` are the batch sizes and lengths at which every output was compared with eager, `error` is",
        "the largest difference over the largest value of an output. Decoders take and return their cache. `RTX` are the chips",
        "(compute capability) for which TensorRT-RTX builds an engine of the same file; for 75, which has no products in float32,",
        "it builds none, and `-` was not tried. Written by `python -m tests.support.export_coverage --rtx --accept`.",
        "",
        f"{len(good)} of {len(rows)} hold: {told}.",
        "",
        "| model | family | cache | opset | flavor | nodes | sites | forms | points | error | seconds | RTX |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        head = f"| {name} | {row['family']} | {'yes' if row['cache'] else '-'} | {row['opset']} | {row['flavor']} |"
        if "failed" in row:
            lines.append(
                f"{head} - | - | {row['failed'].replace('|', 'or').replace('](', '] (')} | - | - | {row['seconds']} | - |"
            )
        else:
            error = f"{row['error']:.1e}"
            tail = f"{row['points']} | {error} | {row['seconds']} | {_built(row)} |"
            lines.append(f"{head} {row['nodes']} | {row['sites']} | {row['forms'] or '-'} | {tail}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compare or accept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--accept", action="store_true")
    parser.add_argument("--opset", type=int, default=20)
    parser.add_argument("--flavor", default="portable")
    parser.add_argument("--rtx", action="store_true")
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    rows, worse = recorded(), 0
    for case in export_cases():
        if given.names and case.name not in given.names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            fresh = exported(case, Path(folder) / "a", given.opset, given.flavor, given.rtx)
        worse += "failed" in fresh and "failed" not in rows.get(case.name, {})
        sys.stdout.write(f"{case.name}: {fresh}\n")
        sys.stdout.flush()
        rows[case.name] = fresh
        if given.accept:  # after each, since all of them take a quarter of an hour
            known = {**recorded(), case.name: fresh}
            rows = {case.name: known[case.name] for case in export_cases() if case.name in known}
            GOLDEN.write_text(json.dumps(rows, indent=1) + "\n")
            PAGE.write_text(page(rows))
    return 1 if worse and not given.accept else 0


if __name__ == "__main__":
    sys.exit(main())
