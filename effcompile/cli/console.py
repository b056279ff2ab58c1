"""Print: tables and JSON on stdout, errors and progress on stderr."""

from __future__ import annotations

import json
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from effcompile.core.errors import EffError

_PIPE_WIDTH = 160  # columns where nobody's terminal limits them
_NAME_WIDTH = 40  # columns that the first cell of a row keeps
_PATIENCE = 2.0  # seconds before a step shows that it is at work


def stdout() -> Console:
    """Return a console on stdout; it honours NO_COLOR and does not fold lines to 80 columns in a pipe."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, soft_wrap=False)


def stderr() -> Console:
    """Return a console on stderr."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else _PIPE_WIDTH, highlight=False)


def print_json(value: Any) -> None:
    """Print one JSON value."""
    print(json.dumps(value, indent=1))


def print_error(error: EffError, as_json: bool) -> None:
    """Print an error: code, site, source, cause and the next command; as JSON on stdout where that was asked for."""
    if as_json:
        print_json({"error": {**error.to_json(), "exit_code": error.exit_code}})
        return
    out = stderr()
    out.print(Text.assemble((error.code, "bold red"), "  ", error.message), soft_wrap=True)
    for name, value in (("site", error.site), ("source", error.source), ("next", error.hint)):
        if value:
            out.print(Text.assemble((f"  {name:<8}", "dim"), value), soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[str] = ()) -> Table:
    """Build a table without frames; the columns in `right` are flush right."""
    built = Table(
        title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    first = min(_NAME_WIDTH, max((len(str(row[0])) for row in rows), default=0))
    for place, name in enumerate(columns):
        side: Literal["left", "right"] = "right" if name in right else "left"
        least = None if place else first  # a narrow terminal folds the prose before it folds the names
        built.add_column(name, justify=side, header_style="dim", overflow="fold", min_width=least)
    for row in rows:
        built.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return built


def good(text: str) -> Text:
    """Return text in the color of what is well."""
    return Text(text, style="green")


def bad(text: str) -> Text:
    """Return text in the color of what is not."""
    return Text(text, style="red")


def dim(text: str) -> Text:
    """Return text that steps back."""
    return Text(text, style="dim")


def command_line(argv: object) -> str:
    """Return the shell command behind a verb's context."""
    return shlex.join(["eff", *argv]) if isinstance(argv, tuple) else ""


@contextmanager
def progress(title: str, total: int | None = None, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show a bar on stderr once the block has run for two seconds, if stderr is a terminal; each call advances it."""
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns: list[Any] = [SpinnerColumn(), TextColumn("{task.description}")]
    columns += [BarColumn(), MofNCompleteColumn()] if total else []
    shown = Progress(*columns, TimeElapsedColumn(), console=stderr(), transient=True)
    task = shown.add_task(title, total=total)
    timer = threading.Timer(_PATIENCE, shown.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda text: shown.update(task, description=f"{title}: {text}" if text else title, advance=1)
    finally:
        timer.cancel()
        shown.stop()
