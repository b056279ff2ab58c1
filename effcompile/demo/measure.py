"""Let the arms take turns on the same text."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effcompile.core.errors import EffError
from effcompile.demo.circumstances import Load, between, machine, read_load, versions
from effcompile.demo.process import ArmProcess
from effcompile.demo.results import TITLES, Cell, Results

ARMS = ("eager", "inductor", "eff")
SETTLE = 0.05
"""Seconds of rest before a timed call, in which the previous arm's threads stop spinning on the cores it needs."""

Windows = dict[int, list[list[int]]]
"""Token ids by length: one window a round."""


@dataclass(frozen=True)
class Job:
    """Say what is measured: a zoo model on windows of text; `rounds` timed calls of every arm at every length."""

    model: str
    windows: Windows
    text: str
    source: str = ""
    arms: tuple[str, ...] = ARMS
    remarks: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Return how many steps the progress bar has: starting an arm, a first call, a timed call."""
        return len(self.arms) * (1 + sum(1 + len(windows) for windows in self.windows.values()))


Progress = Callable[[str], None]
"""Told what begins now, once a step."""


def real_windows(tokenizer: object, lengths: Sequence[int], rounds: int) -> tuple[Windows, str, tuple[str, ...]]:
    """Cut windows out of Austen's novels, or out of Python's documentation where those cannot be had.

    Returns the windows, the name of the text, and remarks for the user.
    """
    from effcompile.models.text import austen_text, pydoc_text, token_windows

    remarks: tuple[str, ...] = ()
    try:
        text, name = austen_text(), "Jane Austen's novels (Debian package r-cran-janeaustenr)"
    except EffError as error:
        text, name = pydoc_text(), "Python's own documentation (pydoc_data.topics)"
        remarks = (f"{error.message}; the text is Python's documentation instead",)
    return {n: token_windows(tokenizer, text, n, rounds).tolist() for n in lengths}, name, remarks


def measure(job: Job, progress: Progress) -> Results:
    """Run every arm in its own process and return what was measured; raise EFF-D001 where an arm dies."""
    begun = time.perf_counter()
    cells: list[Cell] = []
    loads: list[Load] = []
    with tempfile.TemporaryDirectory(prefix="eff-demo-") as folder, contextlib.ExitStack() as stack:
        arms = {name: stack.enter_context(ArmProcess(job.model, name, Path(folder))) for name in job.arms}
        for name, arm in arms.items():
            progress(f"{_title(name)}: loading the model")
            arm.wait_ready()
        for length, windows in job.windows.items():
            first = {name: _first(name, arm, windows[0], progress) for name, arm in arms.items()}
            begin = read_load([arm.pid for arm in arms.values()])
            answers: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
            for number, ids in enumerate(windows):
                for name, arm in arms.items():
                    progress(f"{_title(name)}: {length} tokens, round {number + 1} of {len(windows)}")
                    time.sleep(SETTLE)
                    answers[name].append(arm.ask("run", ids))
            loads.append(between(begin, read_load([arm.pid for arm in arms.values()])))
            cells.extend(_cell(name, length, first[name], answers[name]) for name in arms)
        reports = {name: arm.ask("report") for name, arm in arms.items()}
    return Results(
        model=job.model,
        source=job.source,
        text=job.text,
        cells=tuple(cells),
        report=dict(reports["eff"]["eff"]) if "eff" in reports else {"graphs": [], "notices": [], "counters": {}},
        process_peaks={name: int(answer["peak"]) for name, answer in reports.items()},
        machine=machine(),
        versions=versions(),
        loads=tuple(loads),
        seconds=time.perf_counter() - begun,
        remarks=job.remarks,
    )


def _first(name: str, arm: ArmProcess, ids: Sequence[int], progress: Progress) -> float:
    progress(f"{_title(name)}: {'first call' if name == 'eager' else 'compiling for'} {len(ids)} tokens")
    seconds = float(arm.ask("first", ids)["seconds"])
    return seconds


def _cell(name: str, length: int, first: float, answers: Sequence[dict[str, Any]]) -> Cell:
    return Cell(
        name,
        length,
        seconds=tuple(float(answer["seconds"]) for answer in answers),
        first_seconds=first,
        scores=tuple(tuple(answer["scores"]) for answer in answers),
        peak=max(int(answer["peak"]) for answer in answers),
        rise=max(int(answer["rise"]) for answer in answers),
    )


def _title(name: str) -> str:
    return TITLES.get(name, name)
