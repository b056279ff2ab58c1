"""Draw an explanation, a plan and a ledger on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from effcompile.cli.console import bad, dim, good, table
from effcompile.core.artifact import Manifest
from effcompile.core.plan import GraphPlan, Plan
from effcompile.numerics import GraphLedger
from effcompile.planning.caches import alike, described
from effcompile.planning.expert_rows import alike as alike_experts
from effcompile.planning.expert_rows import described as described_experts
from effcompile.planning.explain import Explanation, brief, duration, groups, headline, sizes
from effcompile.planning.folding import fold
from effcompile.planning.ledger import Row


def draw_explanation(out: Console, found: Explanation, why_not: bool = True) -> None:
    """Print the headline, sites, crossovers, what was kept, breaks, passes and the modelled total."""
    missed = bool(found.not_rewritten)
    out.print(
        Text.assemble((found.model, "bold"), f"  on {found.target} ({found.device.name}), weights: {found.weights}")
    )
    out.print(bad(headline(found)) if missed or found.stop else good(headline(found)))
    if found.stop:
        out.print(bad(f"stopped early, so this is not the whole model: {found.stop}"), soft_wrap=True)
    _draw_sites(out, found)
    _draw_caches(out, found)
    _draw_experts(out, found)
    _draw_not_rewritten(out, found)
    if why_not:
        _draw_declined(out, found)
    _draw_passes(out, found)
    total = found.attention_seconds + found.products_seconds
    stages = ", ".join(f"{name} {seconds:.2g} s" for name, seconds in found.seconds)
    out.print()
    out.print(
        Text.assemble(
            ("modelled  ", "dim"),
            f"attention {duration(found.attention_seconds)} + products with weights {duration(found.products_seconds)} "
            f"= {duration(total)}",
        )
    )
    out.print(dim(f"took      {stages}"))


def _draw_sites(out: Console, found: Explanation) -> None:
    rows: list[list[Any]] = []
    policies = bool(found.policy) or any(row.policy for row in found.sites)
    for group in groups(found.sites):
        row = group.first
        least = f"{duration(row.floor.seconds)} {row.floor.bound}"
        rows.append(
            [group.places, sizes(row.site), row.site.mask, good(row.kernel), duration(group.seconds), row.tag, least]
        )
        if policies:
            rows[-1].insert(3, f"{row.policy}, {row.density.partition(' of ')[0]}" if row.policy else "dense")
    if rows:
        out.print()
        columns = ["site", "shape", "mask", "kernel", "time, all", "", "floor, each"]
        if policies:
            columns.insert(3, "policy")
        out.print(table("Attention", columns, rows, right=("time, all",)))
    sources = {brief(row.site.source): None for group in groups(found.sites) for row in group.rows if row.site.source}
    if sources:
        out.print(dim(f"in {', '.join(list(sources)[:4])}{' and more' if len(sources) > 4 else ''}"), soft_wrap=True)
    lines = {f"{item}": None for group in groups(found.sites) for item in group.first.pays if item.decides}
    for line in lines:
        out.print(f"  {line}")


def _draw_caches(out: Console, found: Explanation) -> None:
    rows = [[fold(places), *described(site)] for site, places in alike(found.caches)]
    if rows:
        out.print()
        out.print(table("KV caches", ("site", "keys", "holds", "format"), rows))


def _draw_experts(out: Console, found: Explanation) -> None:
    rows = [
        [fold(places), *described_experts(row.site), good(row.dispatch), duration(row.seconds * len(places)), row.tag]
        for row, places in alike_experts(found.experts)
    ]
    if rows:
        out.print()
        columns = ("site", "shape", "gate", "routing", "dispatch", "time, all", "")
        out.print(table("Experts", columns, rows, right=("time, all",)))


def _draw_not_rewritten(out: Console, found: Explanation) -> None:
    kept = (*found.not_rewritten, *found.experts_kept)
    if kept:
        out.print()
        out.print(
            table(
                "Kept as it was",
                ("where", "why", "source"),
                [[bad(place), why, brief(source)] for place, source, why in kept],
            )
        )
    absent = [item for item in found.unseen if not item.called]
    if absent:
        out.print()
        out.print(f"Not called: {fold([item.module for item in absent])} ({absent[0].reason})")
    if found.breaks:
        out.print()
        rows = [[brief(b.source) or "?", b.module or "-", b.reason] for b in found.breaks]
        out.print(table("Graph breaks", ("source", "module", "reason"), rows))
    refused = [[graph.owner or "the model", str(graph.refusal)] for graph in found.graphs if graph.refusal]
    if refused:
        out.print()
        out.print(table("Graphs left to TorchInductor", ("graph of", "why"), refused))


def _draw_declined(out: Console, found: Explanation) -> None:
    rows: dict[tuple[str, str, str], list[str]] = {}
    for group in groups(found.sites):
        for item in group.first.declined:
            why = item.refusal.reason + (f" ({item.refusal.hint})" if item.refusal.hint else "")
            rows.setdefault((item.policy, item.refusal.code, why), []).append(group.places)
    if rows:
        out.print()
        listed = [[", ".join(places), *key] for key, places in rows.items()]
        out.print(table("Why not another kernel", ("site", "kernel", "code", "reason"), listed))


def _draw_passes(out: Console, found: Explanation) -> None:
    rows: dict[tuple[str, str, str], int] = {}
    for graph in found.graphs:
        for item in graph.passes:
            key = (item.name, item.state, item.note)
            rows[key] = rows.get(key, 0) + 1
    if rows:
        out.print()
        many = len(found.graphs) > 1
        listed = [[*key, *([count] if many else [])] for key, count in rows.items()]
        out.print(table("Passes", ("pass", "result", "note", *(["graphs"] if many else [])), listed))


def draw_plan(out: Console, plan: Plan, why_not: bool) -> None:
    """Print the choices of a plan, equal sites together, and with `why_not` everything that was declined."""
    sites, graphs = len(plan.fingerprints), len(plan.graphs)
    counted = f"{sites} site{'s' * (sites != 1)} in {graphs} graph{'s' * (graphs != 1)}"
    out.print(Text.assemble(("plan ", "dim"), (plan.hash, "bold"), f"  target {plan.target}, {counted}"))
    if graphs > 1:
        out.print()
        listed = [
            [number, fold(graph.places) or "the model", len(graph.fingerprints), "yes" if graph.training else "no"]
            for number, graph in enumerate(plan.graphs)
        ]
        out.print(table("Graphs", ("", "of", "sites", "gradients"), listed))
    chosen: dict[tuple[str, str, str], list[str]] = {}
    refused: dict[tuple[str, str, str, str], list[str]] = {}
    for number, graph in enumerate(plan.graphs):
        for choice in graph.choices:
            price = "" if choice.seconds is None else f"{duration(choice.seconds)} {choice.tag}"
            sizes = "" if graph.split is None else graph.split.text(choice.range)
            policy = f"{choice.policy} where {sizes}" if sizes else choice.policy
            where = chosen.setdefault((choice.family, policy, price), [])
            where.extend(_where(graph, number, choice.family, choice.site, graphs > 1))
        for item in graph.declined:
            key = (item.policy, item.refusal.code, item.refusal.reason, item.refusal.hint)
            refused.setdefault(key, []).extend(_where(graph, number, item.family, item.site, graphs > 1))
    out.print()
    rows = [[fold(places), family, good(policy), price] for (family, policy, price), places in chosen.items()]
    out.print(table("Choices", ("site", "family", "choice", "each"), rows))
    if why_not:
        out.print()
        columns = ("site", "policy", "code", "reason", "what to do")
        out.print(table("Declined", columns, [[fold(places), *key] for key, places in refused.items()]))
    for note in dict.fromkeys(plan.notes):
        out.print(dim(f"  {note}"))


def _where(graph: GraphPlan, number: int, family: str, site: str, many: bool) -> tuple[str, ...]:
    """Return the places of a decision; a pass concerns its graph, which has a name only beside others."""
    if family != "pass":
        return graph.paths(site)
    return (f"graph {number}",) if many else (site,)


def draw_ledgers(out: Console, ledgers: Sequence[GraphLedger]) -> None:
    """Print the error that each pass adds."""
    for item in ledgers:
        out.print()
        title = (
            f"Numerics of {item.owner or 'the model'} (within: RMSE at most {item.ledger.multiplier:g}x that of eager)"
        )
        out.print(draw_rows(title, item.ledger.rows))


def draw_rows(title: str, rows: Sequence[Row]) -> Text | object:
    """Return the table of ledger rows."""
    listed = [
        [
            row.stage,
            f"{row.added:.2e}",
            f"{row.max_abs:.2e}",
            f"{row.rmse:.2e}",
            f"{row.base_rmse:.2e}",
            good("within") if row.within else bad("out"),
        ]
        for row in rows
    ]
    columns = ("after", "adds, max abs", "max abs", "RMSE to fp64", "RMSE of eager", "")
    return table(title, columns, listed, right=columns[1:5])


def draw_artifact(out: Console, manifest: Manifest) -> None:
    """Print what is in an artifact: its tensors, what became of the sites, and its files."""
    out.print(f"{manifest.model} as {manifest.form} for {manifest.target}, plan {manifest.plan_hash[:12]}")
    sides = (("in", manifest.inputs), ("out", manifest.outputs))
    tensors = [[kind, x.name, x.dtype, " x ".join(map(str, x.shape))] for kind, side in sides for x in side]
    out.print(table("Inputs and outputs", ("", "name", "dtype", "shape"), tensors))
    if manifest.sites:
        rows = [[site.site, site.status, site.form, site.reason] for site in manifest.sites]
        out.print(table("Sites", ("site", "status", "form", "reason"), rows))
    told = [[name, value] for name, value in manifest.details if value]
    if told:
        out.print(table("Details", ("", ""), told))
    files = [[name, f"{e.bytes:,}", e.sha256[:12], "machine code" if e.native else ""] for name, e in manifest.files]
    out.print(table("Files", ("file", "bytes", "sha256", ""), files, right=("bytes",)))
