"""Measure this project against its peers: `eff bench [CASE...]`.

The cases live in `bench/` of a checkout and are not part of the installed package; this verb finds them beside it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

import effcompile
from effcompile.core.errors import EffError

NAME = "bench"
HELP = "Measure this project against eager, TorchInductor, ONNX Runtime and OpenVINO, side by side in one run."


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
    cases: Annotated[
        list[str] | None, typer.Argument(metavar="[CASE]...", help="Cases to run; all when none is named.")
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List cases, rows and arms; measure nothing.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[
        bool, typer.Option("--quick", help="Smallest rows, 2 rounds, nothing written: does every arm run?")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed turns of every arm (7; quick: 2).")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Untimed turns before them (2; quick: 1).")] = None,
    arms: Annotated[
        str | None, typer.Option(help="Arms to run, separated by commas; the first is the baseline.")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Lengths to run, separated by commas.")] = None,
    forms: Annotated[str | None, typer.Option(help="Call forms (masks, layers) to run, separated by commas.")] = None,
    dtypes: Annotated[str | None, typer.Option(help="float32, bfloat16.")] = None,
    limit: Annotated[float, typer.Option(min=0, help="Seconds that preparing one arm may take; 0: no limit.")] = 900.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every arm; all usable cores.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results instead of bench/results.")] = None,
    readme: Annotated[
        bool, typer.Option("--readme", help="Write the stored results into README.md; measure nothing.")
    ] = False,
) -> None:
    """Measure cases against their peers, interleaved; results go to bench/results/CASE.json, row by row."""
    if device not in ("cpu", "cuda"):
        load("clocks").timer_for(device)  # raises with the words it knows
    runner, report = load("run"), load("report")
    results = out or (None if quick else runner.RESULTS)
    chosen = {"threads": threads} if threads else {}
    settings = load("case").Settings(
        device=device,
        arms=words(arms),
        rounds=rounds or (2 if quick else 7),
        warmup=warmup if warmup is not None else (1 if quick else 2),
        quick=quick,
        lengths=numbers(lengths, "--lengths"),
        forms=words(forms),
        dtypes=words(dtypes),
        limit=limit,
        results=results,
        **chosen,
    )
    if readme:
        _write_readme(runner, report, out)
        return
    if show_list:
        _show_list(runner, report, settings, as_json)
        return
    _measure(runner, report, cases or [], settings, as_json)


def _measure(runner: Any, report: Any, names: list[str], settings: Any, as_json: bool) -> None:
    from rich.console import Console

    console = Console()
    selected = runner.choose(names, settings)
    fresh: list[dict[str, Any]] = []

    def shown(document: dict[str, Any]) -> None:
        fresh.append(document)
        if not as_json:
            console.print(report.table(document))
            for line in report.problems(document):
                console.print(f"  {line}", style="yellow", markup=False, highlight=False)

    runner.run(selected, settings, progress=not as_json, shown=shown)
    if as_json:
        typer.echo(json.dumps(fresh, indent=1))
    elif settings.results is not None:
        console.print(f"results: {_short(settings.results)}", highlight=False)


def _show_list(runner: Any, report: Any, settings: Any, as_json: bool) -> None:
    from rich.console import Console

    items = runner.listing(settings)
    if as_json:
        typer.echo(json.dumps(items, indent=1))
    else:
        Console().print(report.list_table(items, settings))


def _write_readme(runner: Any, report: Any, out: Path | None) -> None:
    changed = report.write_readme(checkout() / "README.md", runner.stored(out or runner.RESULTS))
    typer.echo("README.md: results written" if changed else "README.md: already up to date")


def _short(folder: Path) -> str:
    for base in (Path.cwd(), Path(tempfile.gettempdir())):
        if folder.is_relative_to(base):
            return str(folder.relative_to(base)) if base == Path.cwd() else str(folder)
    return str(folder)
