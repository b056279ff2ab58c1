"""Hold what the demo measured, and judge it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effcompile.demo.circumstances import NOISY_SHARE, NOISY_SPREAD, Load

SCHEMA = 1
AGREEMENT = 1e-3
"""Largest relative difference of two arms' perplexities."""
TITLES = {"eager": "PyTorch eager", "inductor": "TorchInductor", "eff": "eff"}


@dataclass(frozen=True)
class Cell:
    """Hold one arm at one length.

    `seconds` are the timed calls, one a round; `first_seconds` is the call before them, which compiles; `scores` are
    the log-likelihoods (nats) of every next token, one tuple a round, from the logits of the timed calls; `peak` is the
    most memory the process held during a timed call and `rise` how far that was above what it held before it (bytes).
    """

    arm: str
    length: int
    seconds: tuple[float, ...]
    first_seconds: float
    scores: tuple[tuple[float, ...], ...]
    peak: int
    rise: int

    @property
    def latency(self) -> float:
        """Return the median seconds of a call."""
        return statistics.median(self.seconds)

    @property
    def compile_seconds(self) -> float | None:
        """Return what the first call cost beyond a steady one; None for eager, which compiles nothing."""
        return None if self.arm == "eager" else max(0.0, self.first_seconds - self.latency)

    @property
    def perplexity(self) -> float:
        """Return exp of the mean negative log-likelihood over all rounds' tokens; infinite where that overflows."""
        try:
            return math.exp(-statistics.fmean(_flat(self)))
        except OverflowError:
            return math.inf

    @property
    def spread(self) -> float:
        """Return the distance between the quartiles over the median; 0 for a single round."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.latency

    def to_json(self) -> dict[str, Any]:
        """Return the measurements and what follows from them as JSON values, without the single tokens."""
        return {
            "arm": self.arm,
            "length": self.length,
            "tokens": sum(map(len, self.scores)),
            "perplexity": self.perplexity,
            "latency_seconds": self.latency,
            "seconds": list(self.seconds),
            "compile_seconds": self.compile_seconds,
            "first_call_seconds": self.first_seconds,
            "peak_bytes": self.peak,
            "rise_bytes": self.rise,
        }


def _flat(cell: Cell) -> list[float]:
    return [value for scores in cell.scores for value in scores]


@dataclass(frozen=True)
class Results:
    """Hold everything; `report` is what `effcompile.report()` gave in the eff arm's process."""

    model: str
    source: str
    text: str
    cells: tuple[Cell, ...]
    report: dict[str, Any]
    process_peaks: dict[str, int]
    machine: dict[str, Any]
    versions: dict[str, str]
    loads: tuple[Load, ...]
    seconds: float
    remarks: tuple[str, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the lengths in tokens, in order."""
        return tuple(dict.fromkeys(cell.length for cell in self.cells))

    @property
    def arms(self) -> tuple[str, ...]:
        """Return the arms in order; the first one is what the others are compared with."""
        return tuple(dict.fromkeys(cell.arm for cell in self.cells))

    def at(self, arm: str, length: int) -> Cell:
        """Return one cell."""
        return next(cell for cell in self.cells if (cell.arm, cell.length) == (arm, length))

    def difference(self, length: int) -> float:
        """Return the largest relative difference between two arms' perplexities; not a number counts as infinite."""
        values = [self.at(arm, length).perplexity for arm in self.arms]
        if not all(math.isfinite(value) and value > 0 for value in values):  # max and min lose a NaN
            return math.inf
        return max(values) / min(values) - 1.0

    def token_difference(self, length: int) -> float:
        """Return the largest difference (nats) of a single token's log-likelihood from the first arm's."""
        base, *others = (self.at(arm, length) for arm in self.arms)
        pairs = [
            abs(x - y)
            for other in others
            for a, b in zip(base.scores, other.scores, strict=True)
            for x, y in zip(a, b, strict=True)
        ]
        return max(pairs, default=0.0)

    @property
    def agreed(self) -> bool:
        """Tell whether the arms' perplexities agree at every length."""
        return all(self.difference(length) <= AGREEMENT for length in self.lengths)

    def verdict(self) -> str:
        """Return one line on whether the arms computed the same."""
        worst = max(self.difference(length) for length in self.lengths)
        token = max(self.token_difference(length) for length in self.lengths)
        if self.agreed:
            return (
                f"The arms agree: perplexities differ by at most {worst:.1e} relative (limit {AGREEMENT:g}), "
                f"the log-likelihood of a single token by at most {token:.1e} nats."
            )
        return f"THE ARMS DISAGREE: perplexities differ by {worst:.2e} relative, more than {AGREEMENT:g}."

    def noise(self) -> tuple[str, ...]:
        """Return why the timings are to be taken with care; empty on a quiet machine."""
        found = []
        worst = max(self.loads, key=lambda load: load.share)
        if worst.share > NOISY_SHARE:
            found.append(f"other processes used {worst.others:.2g} of {worst.cores} cores during the timed calls")
        loose = max(self.cells, key=lambda cell: cell.spread)
        if loose.spread > NOISY_SPREAD:
            where = f"{TITLES.get(loose.arm, loose.arm)} at {loose.length} tokens"
            found.append(f"the rounds of {where} spread by {loose.spread:.0%} of their median")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values, with a schema number."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "source": self.source,
            "text": self.text,
            "call": "use_cache=False, one window of text a round",
            "cells": [cell.to_json() for cell in self.cells],
            "perplexity_difference": {str(n): self.difference(n) for n in self.lengths},
            "token_difference_nats": {str(n): self.token_difference(n) for n in self.lengths},
            "agreed": self.agreed,
            "process_peak_bytes": self.process_peaks,
            "eff_report": self.report,
            "machine": self.machine,
            "versions": self.versions,
            "load": [load.to_json() for load in self.loads],
            "noise": list(self.noise()),
            "seconds": self.seconds,
            "remarks": list(self.remarks),
        }


@dataclass(frozen=True)
class SiteGroup:
    """Hold the sites of one graph that differ in their place only."""

    places: str
    count: int
    shape: str
    mask: str
    kernel: str
    source: str


def site_groups(report: dict[str, Any]) -> tuple[SiteGroup, ...]:
    """Put the sites of a report together by graph, shape, mask and kernel."""
    from effcompile.planning.folding import fold

    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for number, graph in enumerate(report["graphs"]):
        for site in graph["sites"]:
            key = (number, site["kernel"], site["mask"], _shape(site), _tail(site["source"]))
            found.setdefault(key, []).append(site)
    return tuple(
        SiteGroup(fold([str(site["id"]) for site in same]), len(same), key[3], str(key[2]), str(key[1]), key[4])
        for key, same in found.items()
    )


def _shape(site: dict[str, Any]) -> str:
    heads = f"{site['heads']}" if site["heads"] == site["kv_heads"] else f"{site['heads']}/{site['kv_heads']}"
    length = f"{site['q_len']}" if site["q_len"] == site["kv_len"] else f"{site['q_len']}x{site['kv_len']}"
    return f"B={site['batch']} H={heads} S={length} D={site['head_dim']} {site['dtype']}"


def _tail(source: str, parts: int = 3) -> str:
    """Return the end of a path: what names the file without naming the machine."""
    return "/".join(source.split("/")[-parts:])


def notes(report: dict[str, Any]) -> tuple[str, ...]:
    """Return what the passes said, each sentence once, and the notices."""
    said = [note for graph in report["graphs"] for note in graph["notes"]]
    return tuple(dict.fromkeys([*said, *report["notices"]]))


def stage_seconds(report: dict[str, Any]) -> Sequence[tuple[str, float]]:
    """Return the seconds of every stage, over all graphs."""
    total: dict[str, float] = {}
    for graph in report["graphs"]:
        for name, value in graph["seconds"].items():
            total[name] = total.get(name, 0.0) + value
    return tuple(total.items())
