"""Hold what a dry run found: sites, decisions, refusals, breaks, modules not seen, and what it would cost.

`Explanation` is data. `str()` of it is plain text for a Python prompt; `effcompile/cli` draws the same with tables and
`html.py` makes a page of it. All three say the same, and `to_json` is what machines read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effcompile.core.errors import ContractError, EffError
from effcompile.core.plan import Decline, Plan
from effcompile.core.policy import DENSE_LAYER, SITE_FAMILIES
from effcompile.core.program import Break
from effcompile.core.site import AttentionSite, Missed
from effcompile.core.target import Device
from effcompile.planning.caches import CacheRow, alike, described
from effcompile.planning.expert_rows import ExpertRow, expert_lines
from effcompile.planning.experts import keep_experts
from effcompile.planning.folding import fold
from effcompile.planning.pricing import Floor, Pays
from effcompile.planning.tokens import keep_tokens

SCHEMA = 1


@dataclass(frozen=True)
class SiteRow:
    """Describe a site: where it is, what will run it, what declined, and its price in seconds.

    `policy` narrows it, if any, and `density` says how far; the kernel and its price are those of what is left.

    `id` is its path in the module tree. After a graph break one graph serves every layer of the same code: `places` are
    the paths of all of them, `instances` how often the graph ran.
    """

    id: str
    graph: int
    places: tuple[str, ...]
    instances: int
    site: AttentionSite
    kernel: str
    reason: str
    seconds: float
    tag: str
    floor: Floor
    declined: tuple[Decline, ...] = ()
    pays: tuple[Pays, ...] = ()
    policy: str = ""
    density: str = ""
    tokens: str = ""

    @property
    def kept_dense(self) -> Decline | None:
        """Return why the policy that was asked for left the site dense, None where it did not."""
        return next((item for item in self.declined if item.family in SITE_FAMILIES), None)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            **self.site.to_json(),
            "id": self.id,
            "graph": self.graph,
            "places": list(self.places),
            "instances": self.instances,
            "policy": self.policy,
            "density": self.density,
            "tokens": self.tokens,
            "kernel": self.kernel,
            "reason": self.reason,
            "seconds": self.seconds,
            "tag": self.tag,
            "floor_seconds": self.floor.seconds,
            "bound": self.floor.bound,
            "declined": [_decline_json(item) for item in self.declined],
            "crossovers": [
                {"kernel": p.kernel, "against": p.against, "text": str(p), **p.where.to_json()} for p in self.pays
            ],
        }


@dataclass(frozen=True)
class MissedRow:
    """Describe an attention that was seen and left alone."""

    id: str
    graph: int
    missed: Missed

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        refusal = self.missed.refusal
        fields = {"code": refusal.code, "reason": refusal.reason, "hint": refusal.hint}
        return {"id": self.id, "graph": self.graph, "source": self.missed.site.source, **fields}


@dataclass(frozen=True)
class PassRow:
    """Say what became of one pass in one graph."""

    name: str
    phase: str
    state: str  # rewrote | no change | disabled | refused
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"name": self.name, "phase": self.phase, "state": self.state, "note": self.note}


@dataclass(frozen=True)
class GraphRow:
    """Describe one graph: the module that it belongs to, how often it ran, its plan or the reason why it has none."""

    owner: str
    calls: int
    nodes: int
    plan: Plan | None
    refusal: EffError | None = None
    seconds: tuple[tuple[str, float], ...] = ()
    passes: tuple[PassRow, ...] = ()
    products: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        import json

        return {
            "owner": self.owner,
            "calls": self.calls,
            "nodes": self.nodes,
            "seconds": dict(self.seconds),
            "passes": [item.to_json() for item in self.passes],
            "products_seconds": self.products,
            "refusal": self.refusal.to_json() if self.refusal else None,
            "plan": json.loads(self.plan.to_json()) if self.plan else None,
        }


@dataclass(frozen=True)
class Unseen:
    """Name a module that looks like attention and yielded no site, with the reason; `called` tells whether it ran."""

    module: str
    type: str
    reason: str
    source: str = ""
    called: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        fields = {"module": self.module, "type": self.type, "reason": self.reason}
        return {**fields, "source": self.source, "called": self.called}


@dataclass(frozen=True)
class Explanation:
    """Hold a dry run of one model for one target. `weights` is `not read` or `real`."""

    model: str
    target: str
    device: Device
    inputs: tuple[str, ...]
    weights: str
    graphs: tuple[GraphRow, ...]
    sites: tuple[SiteRow, ...]
    missed: tuple[MissedRow, ...]
    breaks: tuple[Break, ...]
    unseen: tuple[Unseen, ...]
    seconds: tuple[tuple[str, float], ...]
    machine: tuple[tuple[str, str], ...] = ()
    stop: str = ""
    command: str = ""
    policy: str = ""
    caches: tuple[CacheRow, ...] = ()
    experts: tuple[ExpertRow, ...] = ()
    experts_kept: tuple[tuple[str, str, str], ...] = ()  # (place, source, reason)

    @property
    def attention_seconds(self) -> float:
        """Return the modelled time of all attention sites."""
        return sum(row.seconds * row.instances for row in self.sites)

    @property
    def products_seconds(self) -> float:
        """Return the modelled time of all matrix products outside attention."""
        return sum(graph.products * graph.calls for graph in self.graphs)

    @property
    def not_rewritten(self) -> tuple[tuple[str, str, str], ...]:
        """Return (place, source, reason) of every attention that ran and was not raised, or that the asked policy refused.

        Layers that the policy itself keeps dense are as they were asked for.
        """
        seen = [(row.id, row.missed.site.source, str(row.missed.refusal)) for row in self.missed]
        for row in self.sites:
            kept = row.kept_dense
            if kept is not None and kept.refusal.code != DENSE_LAYER:
                seen.extend((place, row.site.source, f"{kept.policy}: {kept.refusal}") for place in row.places)
        return (*seen, *((item.module, item.source, item.reason) for item in self.unseen if item.called))

    @property
    def rewritten(self) -> int:
        """Return how many attentions were rewritten, every module of a shared graph counted.

        Where a policy was asked for or replayed, those that it took; else all that were raised.
        """
        policies = bool(self.policy) or any(row.policy for row in self.sites)
        return sum(row.instances for row in self.sites if row.policy or not policies)

    @property
    def plan(self) -> Plan:
        """Return the plan of all graphs; raise `EFF-P505` where the dry run did not see the whole model."""
        plans = [graph.plan for graph in self.graphs if graph.plan is not None]
        if self.stop or not plans:
            refused = [str(graph.refusal) for graph in self.graphs if graph.refusal]
            why = self.stop or "; ".join(refused) or "nothing of it was captured as a graph"
            raise EffError(
                "EFF-P505", f"no plan would hold the whole model: {why}", hint="eff explain MODEL says what was seen"
            )
        return Plan.joined(plans)

    def keep_contract(self, require: Sequence[tuple[str, str]]) -> None:
        """Raise `EFF-P502` with the list of what was missed unless the module tree has what `require` asks for."""
        keep_experts(require, sum(len(row.places) for row in self.experts), self.experts_kept)
        keep_tokens(require, [graph.plan for graph in self.graphs if graph.plan is not None])
        for family, wanted in require:
            if family != "attention":
                continue
            missed = self.not_rewritten
            if (wanted == "all" and missed) or (wanted != "all" and self.rewritten < int(wanted)):
                lines = "".join(f"\n  {place} ({source or 'no source'}): {reason}" for place, source, reason in missed)
                total = self.rewritten + len(missed)
                raise ContractError(
                    "EFF-P502",
                    f"`require` attention={wanted}: {self.rewritten} of {total} sites rewritten{lines}",
                    hint="drop `require` to run anyway; every reason stands above",
                )

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values, with a schema number."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "target": self.target,
            "device": self.device.to_json(),
            "machine": dict(self.machine),
            "inputs": list(self.inputs),
            "weights": self.weights,
            "graphs": [item.to_json() for item in self.graphs],
            "sites": [item.to_json() for item in self.sites],
            "missed": [item.to_json() for item in self.missed],
            "caches": [item.to_json() for item in self.caches],
            "experts": [item.to_json() for item in self.experts],
            "experts_kept": [dict(zip(("id", "source", "reason"), item)) for item in self.experts_kept],
            "breaks": [{"reason": b.reason, "source": b.source, "module": b.module} for b in self.breaks],
            "unseen": [item.to_json() for item in self.unseen],
            "stop": self.stop,
            "seconds": dict(self.seconds),
            "modelled": {"attention_seconds": self.attention_seconds, "products_seconds": self.products_seconds},
            "command": self.command,
            "policy": self.policy,
        }

    def to_html(self) -> str:
        """Return one self-contained page."""
        from effcompile.planning.html import page

        return page(self)

    def __str__(self) -> str:
        return text(self)


@dataclass(frozen=True)
class Group:
    """Hold sites that differ in their place only."""

    places: str
    rows: tuple[SiteRow, ...]

    @property
    def first(self) -> SiteRow:
        """Return the site that stands for the others."""
        return self.rows[0]

    @property
    def seconds(self) -> float:
        """Return the modelled time of all of them."""
        return sum(row.seconds * row.instances for row in self.rows)


def groups(rows: Sequence[SiteRow]) -> tuple[Group, ...]:
    """Put sites of equal shape, mask, kernel and refusals together, in order of first appearance."""
    found: dict[Any, list[SiteRow]] = {}
    for row in rows:
        site = {**row.site.to_json(), "id": "", "source": "", "tensors": ""}
        key = (
            *sorted((k, str(v)) for k, v in site.items()),
            row.kernel,
            row.policy,
            row.tokens,
            *(str(d.refusal) for d in row.declined),
        )
        found.setdefault(key, []).append(row)
    return tuple(Group(fold([place for row in same for place in row.places]), tuple(same)) for same in found.values())


def sizes(site: AttentionSite) -> str:
    """Write the shape of a site in the field's words."""
    heads = f"{site.heads}" if site.heads == site.kv_heads else f"{site.heads}/{site.kv_heads}"
    lengths = f"{site.q_len}" if site.q_len == site.kv_len else f"{site.q_len}x{site.kv_len}"
    return f"B={site.batch} H={heads} S={lengths} D={site.head_dim} {site.dtype}"


def brief(source: str) -> str:
    """Write `file:line` without the way to the installed packages."""
    return source.rpartition("/site-packages/")[2]


def duration(seconds: float) -> str:
    """Write seconds with three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def headline(explanation: Explanation) -> str:
    """Return the one line that answers the question."""
    missed = len(explanation.not_rewritten)
    dense = sum(
        row.instances for row in explanation.sites if row.kept_dense and row.kept_dense.refusal.code == DENSE_LAYER
    )
    total = explanation.rewritten + missed + dense
    graphs, caches = len(explanation.graphs), len(explanation.caches)
    experts = sum(len(row.places) for row in explanation.experts)
    told = f"experts of {experts} layers rewritten, of {len(explanation.experts_kept)} not; "
    kept = f", {dense} dense as asked" if dense else ""
    return (
        f"{total} attention site{'s' * (total != 1)}: {explanation.rewritten} rewritten, {missed} not{kept}; "
        f"{f'{caches} KV caches; ' if caches else ''}"
        f"{told if experts or explanation.experts_kept else ''}"
        f"{graphs} graph{'s' * (graphs != 1)}, {len(explanation.breaks)} break{'s' * (len(explanation.breaks) != 1)}"
    )


def text(explanation: Explanation) -> str:
    """Return the explanation as plain text."""
    lines = [
        f"{explanation.model} on {explanation.target} ({explanation.device.name}), weights: {explanation.weights}",
        headline(explanation),
    ]
    for group in groups(explanation.sites):
        row = group.first
        lines.append(f"  {group.places}")
        lines.append(f"    {sizes(row.site)}  mask {row.site.mask}")
        lines.extend(f"    t{n} is {name}" for n, name in enumerate(row.site.tensors))
        if row.policy:
            lines.append(f"    {row.policy}: {row.density}")
        if row.tokens:
            lines.append(f"    behind it {row.tokens}")
        lines.append(
            f"    {row.kernel}: {duration(group.seconds)} ({row.tag}); floor {duration(row.floor.seconds)} a site "
            f"({row.floor.bound})   {brief(row.site.source)}"
        )
        lines.extend(f"    {item}" for item in row.pays if item.decides)
        lines.extend(f"    not {item.policy}: {item.refusal}" for item in row.declined)
    lines.extend(f"  {fold(places)}: {'  '.join(described(site))}" for site, places in alike(explanation.caches))
    lines.extend(expert_lines(explanation.experts))
    lines.extend(
        f"  kept {place} ({brief(source) or 'no source'}): {reason}"
        for place, source, reason in (*explanation.not_rewritten, *explanation.experts_kept)
    )
    lines.extend(f"  not called: {item.module} ({item.type})" for item in explanation.unseen if not item.called)
    lines.extend(
        f"  break at {brief(b.source) or '?'}{' in ' + b.module if b.module else ''}: {b.reason}"
        for b in explanation.breaks
    )
    lines.extend(f"  graph of {g.owner or 'the model'}: {g.refusal}" for g in explanation.graphs if g.refusal)
    if explanation.stop:
        lines.append(f"  stopped early: {explanation.stop}")
    total = (
        f"attention {duration(explanation.attention_seconds)}, other products {duration(explanation.products_seconds)}"
    )
    lines.append(f"modelled: {total}")
    return "\n".join(lines)


def _decline_json(item: Decline) -> dict[str, str]:
    refusal = item.refusal
    return {"policy": item.policy, "code": refusal.code, "reason": refusal.reason, "hint": refusal.hint}
