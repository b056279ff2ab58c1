"""Tell about mixtures of experts: one line for layers whose experts are alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from effcompile.core.experts import MoESite
from effcompile.core.plan import Decline
from effcompile.planning.folding import fold


@dataclass(frozen=True)
class ExpertRow:
    """Describe the experts of a layer; `places` are the paths of all modules that its graph ran for, `seconds` of one of them."""

    id: str
    graph: int
    places: tuple[str, ...]
    site: MoESite
    dispatch: str
    reason: str
    seconds: float
    tag: str
    declined: tuple[Decline, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        fields = {"dispatch": self.dispatch, "reason": self.reason, "seconds": self.seconds, "tag": self.tag}
        declined = [{"dispatch": d.policy, "code": d.refusal.code, "reason": d.refusal.reason} for d in self.declined]
        return {
            **self.site.to_json(),
            "id": self.id,
            "graph": self.graph,
            "places": list(self.places),
            **fields,
            "declined": declined,
        }


def alike(rows: Sequence[ExpertRow]) -> list[tuple[ExpertRow, list[str]]]:
    """Return one row for each kind of experts, with the places that have it."""
    found: dict[tuple[MoESite, str], tuple[ExpertRow, list[str]]] = {}
    for row in rows:
        key = replace(row.site, id="", source="", entry=""), row.dispatch
        found.setdefault(key, (row, []))[1].extend(row.places)
    return list(found.values())


def described(site: MoESite) -> tuple[str, str, str]:
    """Return sizes, gate and routing of a site in words."""
    if site.capacity:
        sizes = f"S={site.tokens} k={site.top_k} E={site.experts} C={site.capacity} M={site.hidden} {site.dtype}"
        return sizes, "one-hot dispatch with capacity", "routing and drops of the source"
    extras = [word for word, given in (("bias", site.bias), ("weights [in, out]", site.transposed)) if given]
    sizes = f"T={site.tokens} k={site.top_k} E={site.experts} H={site.hidden} I={site.inner} {site.dtype}"
    return sizes, ", ".join([str(site.gate), *extras]), site.router or "routing not known"


def expert_lines(rows: Sequence[ExpertRow]) -> Iterator[str]:
    """Yield the lines of a report in plain text."""
    for row, places in alike(rows):
        yield f"  {fold(places)}"
        yield "    " + "  ".join(described(row.site))
        yield f"    {row.dispatch}: {row.seconds * len(places) * 1e3:.3g} ms ({row.tag}), {row.reason}"
        yield from (f"    not {item.policy}: {item.refusal}" for item in row.declined)
