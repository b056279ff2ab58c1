"""Say what a case is: named rows, and a way to measure one of them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from effcompile import discover
from effcompile.core.errors import unknown

Value = str | int | float


@dataclass(frozen=True)
class Settings:
    """Hold what the command line chose.

    Attributes:
        device: `cpu` or `cuda`.
        arms: names of the arms to run, or () for the case's own.
        rounds, warmup: timed and discarded turns of every arm.
        quick: smallest rows only, to see that everything runs.
        lengths, forms, dtypes: parameter values to keep, or () for the case's own; a case without that parameter
            ignores them.
        limit: seconds that preparing one arm may take (0: no limit).
        threads: worker threads of every arm.
        results: folder that results are read from and written to, or None to keep them in memory.
    """

    device: str = "cpu"
    arms: tuple[str, ...] = ()
    rounds: int = 7
    warmup: int = 2
    quick: bool = False
    lengths: tuple[int, ...] = ()
    forms: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    limit: float = 900.0
    threads: int = field(default_factory=lambda: usable_cores())
    results: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields that a child process needs, as JSON values."""
        return {
            "device": self.device,
            "rounds": self.rounds,
            "warmup": self.warmup,
            "quick": self.quick,
            "lengths": list(self.lengths),
            "forms": list(self.forms),
            "dtypes": list(self.dtypes),
            "limit": self.limit,
            "threads": self.threads,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        """Build settings from `to_json`'s value."""
        given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        return cls(**given)


def usable_cores() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Row:
    """Name one point of a case's parameters; `id` is unique within the case and stable over time."""

    id: str
    parameters: Mapping[str, Value]


@dataclass(frozen=True)
class Watch:
    """Tell a progress display what happens: `say(text)` for the present step, `tick(arm)` after every timed call."""

    say: Callable[[str], None] = lambda text: None
    tick: Callable[[str], None] = lambda arm: None


class Case(ABC):
    """Measure one question. Subclasses are frozen dataclasses in `bench/cases/`, one a file; fields hold sizes."""

    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str]
    """What a row does and what one timed call is, for the report."""
    unit: ClassVar[str] = "call"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    form_words: ClassVar[tuple[str, ...]] = ()
    """What `--forms` can name."""
    dtype_words: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    """What `--dtypes` can name."""
    headline: ClassVar[bool] = True
    """Whether the README shows the case; tables of kernels are for the planner."""
    adds_arms: ClassVar[bool] = False
    """Whether arms that are asked for join those of a stored row, instead of replacing it."""

    @abstractmethod
    def arms(self, device: str) -> tuple[str, ...]:
        """Return the names of the arms that run unless others are asked for; the first is the baseline."""

    def known_arms(self, device: str) -> tuple[str, ...]:
        """Return the names of all arms that can be asked for."""
        return self.arms(device)

    @abstractmethod
    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return the rows that the settings choose."""

    @abstractmethod
    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure one row and return it, or the several that are measured together, as JSON values.

        Each has `id`, `parameters`, `arms` and `ratios`; see store.py.
        """

    def chosen_arms(self, settings: Settings) -> tuple[str, ...]:
        """Return the arms to run.

        Raises:
            EffError: EFF-B103 for an arm that this case does not have.
        """
        known = self.known_arms(settings.device)
        for name in settings.arms:
            if name not in known:
                raise unknown("EFF-B103", f"arm of the case {self.name}", name, known, hint="eff bench --list")
        return settings.arms or self.arms(settings.device)


def cases() -> tuple[Case, ...]:
    """Return all cases with their defaults, by name."""
    found = discover.classes(Case, "bench.cases")  # type: ignore[type-abstract]
    return tuple(cls() for cls in found)


def find_case(name: str) -> Case:
    """Return the case called `name`.

    Raises:
        EffError: EFF-B102 with the near matches.
    """
    known = {case.name: case for case in cases()}
    if name not in known:
        raise unknown("EFF-B102", "bench case", name, known, hint="eff bench --list")
    return known[name]


def grid(settings: Settings, lengths: Sequence[int], forms: Sequence[str], dtypes: Sequence[str]) -> list[Row]:
    """Return the rows of a length x form x dtype grid, narrowed by the settings; a word the case lacks is dropped.

    Lengths that are asked for replace the case's own, since any length can be run.
    """
    rows = []
    for length in settings.lengths or lengths:
        for form in [f for f in forms if f in settings.forms or not settings.forms]:
            for dtype in [d for d in dtypes if d in settings.dtypes or not settings.dtypes]:
                rows.append(Row(f"{length}-{form}-{dtype}", {"length": length, "form": form, "dtype": dtype}))
    return rows
