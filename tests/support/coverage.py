"""Say for every model of the matrix which attention sites were found, what runs them, and why the rest stayed.

`python -m tests.support.coverage --accept [CASE...]` writes tests/golden/coverage.json and docs/coverage.md; without `--accept` it
prints what differs and exits 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from effcompile.backend import compile_dynamo
from effcompile.core.mask import Opaque
from effcompile.core.options import Options
from effcompile.core.target import Target
from effcompile.planning.planner import KERNEL
from effcompile.report import clear, log
from effcompile.targets import cpu
from tests.support.hf_zoo import Call, MatrixCase, cases, trace_call

ROOT = Path(__file__).parents[2]
GOLDEN, PAGE = ROOT / "tests" / "golden" / "coverage.json", ROOT / "docs" / "coverage.md"
PLANNED_FOR = Target(cpu.model(cpu.AVX512_BF16_NARROW, cores=2, clock=2.6e9, vendor="amd"))
"""Kernels are chosen for one CPU, whichever runs them, so that the table is the same everywhere."""
Row = dict[str, Any]


def run_through_eff(case: MatrixCase, call: Call, emit: str = "interpreter") -> tuple[dict[str, Tensor], int, Row]:
    """Return outputs, graph breaks and the coverage row of one call compiled by our backend (strict)."""
    options = Options.parse({"strict": True, "emit": emit})
    clear()
    with mock.patch.dict(compile_dynamo.__globals__, detect=lambda kind: PLANNED_FOR):
        trace = trace_call(
            case.build(), case, call, backend=lambda graph, inputs: compile_dynamo(graph, inputs, options)
        )
    sites: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for record in log().graphs:
        for site in record.compiled.sites:
            choice = record.compiled.plan.of(site.id, KERNEL)
            assert choice is not None
            mask = "opaque" if isinstance(site.mask, Opaque) else str(site.mask)
            sites[f"{site.idiom} | {mask} | {choice.policy}"] += 1
        for missed in record.compiled.missed:
            refused[f"{missed.site.idiom} | {missed.refusal.code} {missed.refusal.reason}"] += 1
    row = {"graphs": trace.graphs, "sites": dict(sorted(sites.items())), "refused": dict(sorted(refused.items()))}
    return trace.outputs, trace.breaks, row


def recorded() -> dict[str, dict[str, Row]]:
    """Return case -> call -> row as committed."""
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def page(rows: dict[str, dict[str, Row]]) -> str:
    """Return the coverage table as Markdown."""
    lines = [
        "# Coverage",
        "",
        "Unmodified transformers 5.23 and diffusers 0.42 models with random weights, torch 2.13, CPU. Every line was compared with",
        "eager. Written by `python -m tests.support.coverage --accept`; a site counts once for each graph that holds it.",
        "",
        "| model | call | sites | rewritten | idiom, mask and kernel | refused, because |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, calls in rows.items():
        for call, row in calls.items():
            done, left = sum(row["sites"].values()), sum(row["refused"].values())
            shown = "<br>".join(f"{n} x {text.replace(' | ', ', ')}" for text, n in row["sites"].items())
            why = "<br>".join(f"{n} x {text.replace(' | ', ': ')}" for text, n in row["refused"].items())
            lines.append(f"| {name} | {call} | {done + left} | {done} | {shown.replace('|', 'or')} | {why or '-'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compare or accept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--accept", action="store_true")
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    rows, different = recorded(), 0
    for case in cases():
        if given.names and case.name not in given.names:
            continue
        fresh = {call.name: run_through_eff(case, call)[2] for call in case.calls}
        if fresh != rows.get(case.name):
            different += 1
            sys.stderr.write(f"{case.name} differs\n")
        rows[case.name] = fresh
    if given.accept:
        order = [case.name for case in cases()]
        rows = {name: rows[name] for name in order if name in rows}
        GOLDEN.write_text(json.dumps(rows, indent=1) + "\n")
        PAGE.write_text(page(rows))
        return 0
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
