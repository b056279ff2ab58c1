"""Count and keep what the backend did in this process: one record per graph, read by `eff.report()`.

The log is process-wide, like Dynamo's counters, because Dynamo owns the calls and gives a backend no place to put a result.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from effcompile.compiler import Compiled
from effcompile.core.errors import EffError
from effcompile.core.experts import FAMILY
from effcompile.core.policy import SITE_FAMILIES


@dataclass(frozen=True)
class GraphRecord:
    """Describe one compiled graph: its plan, sites, misses and the seconds of each stage."""

    compiled: Compiled
    seconds: tuple[tuple[str, float], ...]


@dataclass
class Log:
    """Hold the records and counters of this process."""

    graphs: list[GraphRecord] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)
    notices: list[str] = field(default_factory=list)


_LOG = Log()


@dataclass
class Clock:
    """Measure the stages of one compilation."""

    parts: dict[str, float] = field(default_factory=dict)
    begun: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Charge the time since the last lap to `name`."""
        now = time.perf_counter()
        self.parts[name] = now - self.begun
        self.begun = now

    def add(self, parts: tuple[tuple[str, float], ...]) -> None:
        """Take over laps measured elsewhere."""
        self.parts.update(parts)
        self.begun = time.perf_counter()


@contextlib.contextmanager
def timed() -> Iterator[Clock]:
    """Yield a clock."""
    yield Clock()


def compiled(result: Compiled, seconds: dict[str, float]) -> None:
    """Record a graph that was rewritten, and write it into torch's structured trace."""
    from torch._logging import trace_structured

    _LOG.graphs.append(GraphRecord(result, tuple(seconds.items())))
    _LOG.counters["graphs"] += 1
    _LOG.counters["sites"] += len(result.sites)
    _LOG.counters["missed"] += len(result.missed)
    for word, found in (("caches", result.caches), ("experts", result.experts)):
        if found:
            _LOG.counters[word] += len(found)
    if result.experts_missed:
        _LOG.counters["experts missed"] += len(result.experts_missed)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "eff_plan", "encoding": "json"},
        payload_fn=lambda: result.plan.to_json(),
    )


def refused(error: EffError) -> None:
    """Count a graph that went to TorchInductor on purpose."""
    _LOG.counters[f"refused {error.code}"] += 1
    _LOG.notices.append(str(error))


def failed(error: Exception) -> None:
    """Count a graph that went to TorchInductor because a stage failed."""
    _LOG.counters["fallbacks"] += 1
    _LOG.notices.append(f"{type(error).__name__}: {error}")


def looped(module: str, source: str) -> None:
    """Count a graph that a loop over experts cut off, and say what mends it."""
    _LOG.counters["loops over experts"] += 1
    of = f"`{module}`" if module else "the model"
    _LOG.notices.append(
        f"EFF-M301 the experts of {of} run outside the graphs: their loop breaks the graph at {source or '?'}; "
        "next: model = eff.prepare(model), before torch.compile"
    )


def stale(names: tuple[str, ...]) -> None:
    """Count a call whose mask buffer changed after compiling."""
    _LOG.counters["stale"] += 1
    _LOG.notices.append(f"the mask buffer behind {', '.join(names)} changed: its graph runs as it was written")


def second_range(text: str) -> None:
    """Count a graph that was compiled for the other range of a size as well, when a value of it arrived."""
    _LOG.counters["second ranges"] += 1
    _LOG.notices.append(f"compiled for {text} too")


def count() -> int:
    """Return how many graphs were recorded."""
    return len(_LOG.graphs)


def log() -> Log:
    """Return the live log."""
    return _LOG


def clear() -> None:
    """Forget everything."""
    _LOG.graphs.clear()
    _LOG.counters.clear()
    _LOG.notices.clear()


def summary() -> dict[str, Any]:
    """Return counters, notices and one line a site, as JSON values."""
    return {
        "counters": dict(_LOG.counters),
        "notices": list(_LOG.notices),
        "graphs": [
            {
                "seconds": dict(record.seconds),
                "sites": [
                    {
                        **site.to_json(),
                        "policy": ", ".join(filter(None, (plan.policy(site.id, name) for name in SITE_FAMILIES))),
                        "kernel": plan.policy(site.id, "attention-kernel"),
                    }
                    for plan in (record.compiled.plan,)
                    for site in record.compiled.sites
                ],
                "caches": [site.to_json() for site in record.compiled.caches],
                "experts": [
                    {**site.to_json(), "dispatch": record.compiled.plan.policy(site.id, FAMILY)}
                    for site in record.compiled.experts
                ],
                "missed": [
                    {**m.site.to_json(), "refusal": str(m.refusal)}
                    for m in (*record.compiled.missed, *record.compiled.experts_missed)
                ],
                "notes": list(record.compiled.plan.notes),
                "breaks": [{"reason": b.reason, "source": b.source} for b in record.compiled.program.breaks],
            }
            for record in _LOG.graphs
        ],
    }


def to_text() -> str:
    """Return the summary as JSON text."""
    return json.dumps(summary(), indent=1)
