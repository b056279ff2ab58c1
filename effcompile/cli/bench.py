"""Measure this project against its peers: `eff bench [CASE...]`.

The cases live in `bench/` of a checkout and are not part of the installed package; this verb finds them beside it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import effcompile
from effcompile.cli import parameters as given
from effcompile.cli.console import bad, print_json, stdout
from effcompile.core.errors import EffError
from effcompile.core.target import dtype_name

Cases = Annotated[list[str] | None, typer.Argument(metavar="[CASE]...", help="Cases to run; all when none is named.")]
Listing = Annotated[bool, typer.Option("--list", help="List cases, rows and arms; measure nothing.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Quick = Annotated[bool, typer.Option("--quick", help="Smallest rows, 2 rounds, nothing written: does every arm run?")]
Rounds = Annotated[int | None, typer.Option(min=1, help="Timed turns of every arm.", show_default="7; quick: 2")]
Warmup = Annotated[int | None, typer.Option(min=0, help="Untimed turns before them.", show_default="2; quick: 1")]
Arms = Annotated[str | None, typer.Option(help="Arms to run, separated by commas; the first is the baseline.")]
Lengths = Annotated[str | None, typer.Option(help="Lengths to run, separated by commas.")]
Forms = Annotated[str | None, typer.Option(help="Call forms (masks, layers) to run, separated by commas.")]
Dtypes = Annotated[str | None, typer.Option(help="float32, bfloat16, or both separated by a comma.")]
Limit = Annotated[float, typer.Option(min=0, help="Seconds that preparing one arm may take; 0: no limit.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of every arm.", show_default="all usable cores")]
Out = Annotated[Path | None, typer.Option(help="Folder of the results.", show_default="bench/results; quick: none")]
Readme = Annotated[bool, typer.Option("--readme", help="Write the stored results into README.md; measure nothing.")]

Install = Annotated[
    bool, typer.Option("--install", help="Put the stored tables of kernels into the package; measure nothing.")
]


def checkout() -> Path:
    """Return the root of the checkout that this package runs from.

    Raises:
        EffError: EFF-B101 where the package was installed without it.
    """
    root = Path(effcompile.__file__).resolve().parent.parent
    if not (root / "bench" / "run.py").is_file():
        raise EffError(
            "EFF-B101",
            "the benchmarks are part of the repository and not of the installed package",
            hint="clone the repository, then: python -m pip install -e '.[bench]' && eff bench",
        )
    return root


def load(module: str) -> Any:
    """Import a module of the checkout's `bench` package, whatever the working directory is.

    Raises:
        EffError: EFF-B101 where there is no checkout.
    """
    root = checkout()
    present = sys.modules.get("bench")
    if present is None:
        folder = root / "bench"
        spec = importlib.util.spec_from_file_location(
            "bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules["bench"] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"bench.{module}")


def words(text: str | None) -> tuple[str, ...]:
    """Split a comma-separated option."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def numbers(text: str | None, option: str) -> tuple[int, ...]:
    """Split a comma-separated option of positive integers.

    Raises:
        EffError: EFF-B108 for anything else.
    """
    found = words(text)
    if any(not part.isdigit() or int(part) < 1 for part in found):
        raise EffError("EFF-B108", f"{option} takes positive integers, not `{text}`", hint=f"{option} 512,1024")
    return tuple(int(part) for part in found)


def bench(
    cases: Cases = None,
    listing: Listing = False,
    device: Device = "cpu",
    quick: Quick = False,
    rounds: Rounds = None,
    warmup: Warmup = None,
    arms: Arms = None,
    lengths: Lengths = None,
    forms: Forms = None,
    dtypes: Dtypes = None,
    limit: Limit = 900.0,
    threads: Threads = None,
    out: Out = None,
    readme: Readme = False,
    install: Install = False,
    as_json: given.AsJson = False,
) -> int:
    """Measure this project against eager, TorchInductor, ONNX Runtime and OpenVINO, side by side in one run.

    The arms take turns; results go to bench/results/MACHINE/CASE.json row by row, so a run that is stopped keeps what it has,
    and one that is repeated replaces its rows. Exit code 1 where an arm of ours failed or is less exact
    than the rule allows.
    """
    runner, report = load("run"), load("report")
    if readme:
        return _write_pages(report, runner.stored(out or runner.RESULTS))
    if install:
        for line in load("condense").install_tables(cases or [], out or runner.RESULTS):
            stdout().print(line)
        return 0
    settings = load("case").Settings(
        device=device,
        arms=words(arms),
        rounds=rounds or (2 if quick else 7),
        warmup=warmup if warmup is not None else (1 if quick else 2),
        quick=quick,
        lengths=numbers(lengths, "--lengths"),
        forms=words(forms),
        dtypes=tuple(dtype_name(word) for word in words(dtypes)),
        limit=limit,
        results=out or (None if quick else runner.RESULTS),
        **({"threads": threads} if threads else {}),
    )
    if listing:
        items = runner.listing(settings)
        print_json(items) if as_json else stdout().print(report.list_table(items, settings))
        return 0
    return _measure(runner, report, runner.choose(cases or [], settings), settings, as_json)


_REPORTS = {
    "sparse_attention.md": "quality_report",
    "kv_cache.md": "cache_report",
    "experts.md": "experts_report",
    "tokens.md": "token_report",
    "adaptive.md": "adaptive_report",
    "export.md": "export_report",
    "diffusion.md": "schedules_report",
}
"""The pages of docs with results, and the module of bench that writes each."""


def _write_pages(report: Any, documents: Any) -> int:
    pages = {"README.md": report.write_readme(checkout() / "README.md", documents)}
    for page, module in _REPORTS.items():
        made = load(module)
        if mine := [document for document in documents if document["case"] in made.CASES]:
            pages[f"docs/{page}"] = made.write(checkout() / "docs", mine)
    for page, changed in pages.items():
        stdout().print(f"{page}: results written" if changed else f"{page}: already up to date")
    return 0


def _measure(runner: Any, report: Any, chosen: Any, settings: Any, as_json: bool) -> int:
    fresh: list[dict[str, Any]] = []

    def shown(document: dict[str, Any]) -> None:
        fresh.append(document)
        if not as_json:
            out = stdout()
            out.print(report.table(document))
            out.print(report.caption(document), style="dim", soft_wrap=True)
            for line in report.problems(document):
                out.print(bad(f"  {line}"), soft_wrap=True)
            out.print()

    runner.run(chosen, settings, progress=not as_json, shown=shown)
    if as_json:
        print_json(fresh)
    return 1 if any(report.failures(document) for document in fresh) else 0
