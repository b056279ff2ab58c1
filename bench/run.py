"""Run cases row by row, and keep every row as soon as it is measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import store
from bench.case import Case, Settings, Watch, cases, find_case
from bench.clocks import require_device
from bench.manifest import ROOT, machine_name, manifest
from effcompile.core.errors import EffError, unknown

RESULTS = ROOT / "bench" / "results"


def choose(names: Sequence[str], settings: Settings) -> tuple[Case, ...]:
    """Return the named cases, or all that make sense on the device.

    Raises:
        EffError: EFF-B102 unknown case, EFF-B103 unknown arm, EFF-B105 no such device or a case that does not run
            there, EFF-B107 a form or dtype that no case has, or no row left.
    """
    require_device(settings.device)
    if names:
        chosen = tuple(find_case(name) for name in names)
        for case in chosen:
            if settings.device not in case.devices:
                raise EffError(
                    "EFF-B105", f"the case {case.name} runs on {', '.join(case.devices)} only", hint="eff bench --list"
                )
    else:
        chosen = tuple(case for case in cases() if settings.device in case.devices)
    _check_words(chosen, settings)
    for case in chosen:
        case.chosen_arms(settings)
        if names and not case.rows(settings):
            raise EffError(
                "EFF-B107", f"no row of {case.name} has these lengths, forms and dtypes", hint="eff bench --list"
            )
    return chosen


def _check_words(chosen: Sequence[Case], settings: Settings) -> None:
    """Refuse a form or dtype that none of the cases has; a case that lacks one leaves it to the others."""
    for option, given, known in (
        ("form", settings.forms, {word for case in chosen for word in case.form_words}),
        ("dtype", settings.dtypes, {word for case in chosen for word in case.dtype_words}),
    ):
        for word in given:
            if word not in known:
                raise unknown("EFF-B107", option, word, known, hint="eff bench --list")


def run(
    chosen: Sequence[Case],
    settings: Settings,
    *,
    progress: bool = False,
    shown: Callable[[dict[str, Any]], None] = lambda document: None,
) -> list[dict[str, Any]]:
    """Measure cases and return their documents, with the rows of this run put into what the result files hold.

    With `settings.results` None nothing is read or written. `shown` gets each document with the rows of this run only.
    """
    documents = []
    for case in chosen:
        documents.append(_run_case(case, settings, progress, shown))
    return documents


def _run_case(
    case: Case, settings: Settings, progress: bool, shown: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    machine = machine_name(settings.device)
    path = None if settings.results is None else store.path_of(settings.results, machine, case.name)
    fresh = store.empty(case.name, case.title, case.about, case.unit, settings.device, machine, headline=case.headline)
    document = (
        fresh if path is None or not path.is_file() else {**store.read(path), "title": case.title, "about": case.about}
    )
    torch.set_num_threads(settings.threads)
    facts = manifest(settings)
    rows = case.rows(settings)
    order = [row.id for row in case.rows(Settings(device=settings.device))]
    arms = case.chosen_arms(settings)
    with _watch(case.name, len(rows), len(arms) * (settings.rounds + settings.warmup), progress) as begin:
        for row in rows:
            measured = case.measure(row, settings, begin(row.id))
            # A table has a row for each problem, to which a new kernel is added without measuring the others again.
            add = bool(settings.arms) and case.adds_arms
            document = store.merge(document, facts, measured, order, add_arms=add)
            fresh = store.merge(fresh, facts, measured)
            if path is not None:
                store.write(path, document)
    shown(fresh)
    return document


@contextmanager
def _watch(name: str, rows: int, ticks: int, shown: bool) -> Iterator[Callable[[str], Watch]]:
    """Yield a function that begins a row and returns its watch; the bar is drawn on a terminal only."""
    if not shown or not sys.stderr.isatty():
        yield lambda row: Watch()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[step]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        whole = bar.add_task(name, total=rows, step="")
        part = bar.add_task("", total=ticks, step="")
        done = [0]

        def begin(row: str) -> Watch:
            bar.update(whole, completed=done[0], step=f"row {done[0] + 1} of {rows}")
            bar.reset(part, total=ticks, description=f"  {row}", step="")
            done[0] += 1
            return Watch(lambda text: bar.update(part, step=text), lambda arm: bar.update(part, advance=1, step=arm))

        yield begin


def listing(settings: Settings) -> list[dict[str, Any]]:
    """Return every case with its rows and arms on the device, as JSON values."""
    return [
        {
            "case": case.name,
            "title": case.title,
            "about": case.about,
            "devices": list(case.devices),
            "rows": [row.id for row in case.rows(settings)],
            "forms": list(case.form_words),
            "arms": list(case.arms(settings.device)),
            "other_arms": [name for name in case.known_arms(settings.device) if name not in case.arms(settings.device)],
        }
        for case in cases()
        if settings.device in case.devices
    ]


def stored(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return all result documents of a folder, by machine and case.

    Raises:
        EffError: EFF-B106 where there is none, or one cannot be read.
    """
    paths = sorted(folder.glob("*/*.json"))
    if not paths:
        raise EffError("EFF-B106", "there are no benchmark results yet", hint="eff bench")
    return [store.read(path) for path in paths]
