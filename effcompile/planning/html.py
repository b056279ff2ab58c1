"""Write an explanation as one self-contained page: inline style and SVG, no script, nothing loaded from anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from effcompile.planning import chart
from effcompile.planning.expert_rows import alike, described
from effcompile.planning.explain import Explanation, Group, SiteRow, brief, duration, groups, headline, sizes
from effcompile.planning.folding import fold

if TYPE_CHECKING:
    from effcompile.planning.ledger import Ledger

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --dim: #667085; --line: #d8dee8; --page: #fff; --soft: #f5f7fa;
  --bar: #a9c3ee; --floor: #2f6fd6; --good: #1a7f4b; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #98a2b3; --line: #333c4d; --page: #12161f;
  --soft: #1a202c; --bar: #33507f; --floor: #7aa7f5; --good: #4cc38a; --bad: #ff8a7a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 70rem; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p.sub { color: var(--dim); margin: .2rem 0 1rem; }
.wide { overflow-x: auto; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.2rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem; min-width: 8rem;
  background: var(--soft); }
.card b { display: block; font-size: 1.35rem; }
.card span { color: var(--dim); font-size: .85rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: left; color: var(--dim); font-weight: 600; white-space: nowrap; }
th, td { padding: .35rem .7rem .35rem 0; vertical-align: top; border-bottom: 1px solid var(--line); }
td:first-child, td code { white-space: nowrap; }
code, pre { font: .85rem/1.45 ui-monospace, monospace; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; overflow-x: auto; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.dim { color: var(--dim); }
details { margin: .4rem 0; }
summary { cursor: pointer; }
svg.chart { width: 100%; max-width: 52rem; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
svg .value { fill: var(--dim); }
svg .bar { fill: var(--bar); }
svg .floor { fill: var(--floor); }
svg .grid { stroke: var(--line); }
"""


def page(explanation: Explanation, ledgers: Sequence[tuple[str, Ledger]] = ()) -> str:
    """Return the page; `ledgers` are (graph, ledger) pairs from a run on real inputs."""
    title = f"{explanation.model} on {explanation.target}"
    parts = [
        f"<h1>{_t(explanation.model)}</h1>",
        f'<p class="sub">target {_t(explanation.target)} ({_t(explanation.device.name)}) · '
        f"inputs {_t(', '.join(explanation.inputs) or 'none')} · weights: {_t(explanation.weights)}</p>",
        _cards(explanation),
        _stop(explanation),
        _section("Where the modelled time goes", _time_chart(explanation)),
        _section("Attention sites", _sites(explanation)),
        _section("Experts", _experts(explanation)),
        _section("Where a kernel pays, by length", _crossovers(explanation)),
        _section("Kept as it was", _kept(explanation)),
        _section("Graph breaks", _breaks(explanation)),
        _section("Modules not called", _not_called(explanation)),
        _section("Why not another kernel", _declined(explanation)),
        _section("Passes", _passes(explanation)),
        *(_section(f"Numerics of {owner or 'the model'}", _ledger(ledger)) for owner, ledger in ledgers),
        _section("Seconds by stage", _stages(explanation)),
        _section("Environment", _rows(("what", "value"), [[_t(k), _t(v)] for k, v in explanation.machine])),
        _section("Plan", _plans(explanation)),
        _section("Reproduce", f"<pre>{_t(explanation.command)}</pre>" if explanation.command else ""),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_t(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _t(value: object) -> str:
    return escape(str(value))


def _section(title: str, body: str) -> str:
    return f"<h2>{_t(title)}</h2>{body}" if body else ""


def _rows(head: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    top = "".join(f"<th>{_t(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cards(explanation: Explanation) -> str:
    missed = len(explanation.not_rewritten)
    total = explanation.attention_seconds + explanation.products_seconds
    cards = (
        (f"{explanation.rewritten} of {explanation.rewritten + missed}", "attention sites rewritten", not missed),
        (str(len(explanation.graphs)), "graphs", True),
        (str(len(explanation.breaks)), "graph breaks", not explanation.breaks),
        (duration(explanation.attention_seconds), "attention, modelled", True),
        (duration(total), "attention and products, modelled", True),
    )
    return (
        f'<div class="cards" title="{_t(headline(explanation))}">'
        + "".join(
            f'<div class="card"><b class="{"" if good else "bad"}">{_t(value)}</b><span>{_t(name)}</span></div>'
            for value, name, good in cards
        )
        + "</div>"
    )


def _stop(explanation: Explanation) -> str:
    if not explanation.stop:
        return ""
    return f'<p class="bad">The run stopped early, so this page is not the whole model: {_t(explanation.stop)}</p>'


def _time_chart(explanation: Explanation) -> str:
    rows = [(g.places, g.seconds, _floor(g), f"{g.first.kernel}, {g.first.tag}") for g in groups(explanation.sites)]
    if explanation.products_seconds:
        rows.append(("products with weights", explanation.products_seconds, 0.0, "roofline, modelled"))
    if not rows:
        return ""
    most = max(seconds for _, seconds, _, _ in rows)
    unit, scale = ("s", 1.0) if most >= 1 else ("ms", 1e-3) if most >= 1e-3 else ("us", 1e-6)
    note = "Dark: the roofline floor of the site on this device. Every figure is modelled unless it says measured."
    return f'{chart.bars(rows, unit, scale)}<p class="dim">{note}</p>'


def _floor(group: Group) -> float:
    return sum(row.floor.seconds * row.instances for row in group.rows)


def _sites(explanation: Explanation) -> str:
    rows = []
    for group in groups(explanation.sites):
        row = group.first
        rows.append(
            [
                f"<code>{_t(group.places)}</code>",
                _t(sizes(row.site)),
                _t(row.site.mask) + _policy(row),
                f"<b>{_t(row.kernel)}</b><br><span class=dim>{_t(row.reason)}</span>",
                f"{_t(duration(group.seconds))} <span class=dim>{_t(row.tag)}</span>",
                f"{_t(duration(row.floor.seconds))} <span class=dim>{_t(row.floor.bound)}</span>",
                f"<code>{_t(brief(row.site.source))}</code>",
            ]
        )
    return _rows(("site", "shape", "mask", "kernel", "time, all", "floor, each", "source"), rows)


def _policy(row: SiteRow) -> str:
    return f"<br><b>{_t(row.policy)}</b><br><span class=dim>{_t(row.density)}</span>" if row.policy else ""


def _crossovers(explanation: Explanation) -> str:
    bars, lines = [], []
    for group in groups(explanation.sites):
        for pays in group.first.pays:
            bars.append((f"{pays.kernel} over {pays.against}", pays.where.intervals, pays.where.lo, pays.where.hi))
            lines.append(f"<li><code>{_t(group.places)}</code>: {_t(pays)}</li>")
    seen = list(dict.fromkeys(bars))
    return f"{chart.intervals(seen)}<ul>{''.join(lines)}</ul>" if seen else ""


def _experts(explanation: Explanation) -> str:
    rows = [
        [_t(cell) for cell in (fold(places), *described(row.site), row.dispatch, duration(row.seconds * len(places)))]
        for row, places in alike(explanation.experts)
    ]
    return _rows(("site", "shape", "gate", "routing", "dispatch", "time, all"), rows)


def _kept(explanation: Explanation) -> str:
    rows = [
        [f"<code>{_t(p)}</code>", _t(why), f"<code>{_t(brief(s))}</code>"]
        for p, s, why in (*explanation.not_rewritten, *explanation.experts_kept)
    ]
    return (
        _rows(("where", "why", "source"), rows)
        or '<p class="good">Nothing: every attention that ran was rewritten.</p>'
    )


def _breaks(explanation: Explanation) -> str:
    rows = [
        [f"<code>{_t(brief(b.source))}</code>", f"<code>{_t(b.module)}</code>", _t(b.reason)]
        for b in explanation.breaks
    ]
    return _rows(("source", "module", "reason"), rows)


def _not_called(explanation: Explanation) -> str:
    rows = [[f"<code>{_t(u.module)}</code>", _t(u.type), _t(u.reason)] for u in explanation.unseen if not u.called]
    return _rows(("module", "class", "reason"), rows)


def _declined(explanation: Explanation) -> str:
    rows = []
    for group in groups(explanation.sites):
        for item in group.first.declined:
            refusal = item.refusal
            cells = (group.places, item.policy, refusal.code, refusal.reason, refusal.hint)
            rows.append([f"<code>{_t(cells[0])}</code>", *(_t(cell) for cell in cells[1:])])
    return _rows(("site", "kernel", "code", "reason", "what to do"), rows)


def _passes(explanation: Explanation) -> str:
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for number, graph in enumerate(explanation.graphs):
        for item in graph.passes:
            found.setdefault((item.name, item.phase, item.state, item.note), []).append(f"graph {number}")
    rows = [[f"<code>{_t(k[0])}</code>", _t(k[1]), _t(k[2]), _t(k[3]), _t(fold(v))] for k, v in found.items()]
    return _rows(("pass", "phase", "result", "note", "where"), rows)


def _ledger(ledger: Ledger) -> str:
    rows = [
        [
            _t(row.stage),
            f"{row.added:.3g}",
            f"{row.max_abs:.3g}",
            f"{row.rmse:.3g}",
            f"{row.base_rmse:.3g}",
            '<span class="good">within</span>' if row.within else '<span class="bad">out</span>',
        ]
        for row in ledger.rows
    ]
    return _rows(("after", "added", "max abs", "RMSE to fp64", "RMSE of eager", f"rule x{ledger.multiplier:g}"), rows)


def _stages(explanation: Explanation) -> str:
    return _rows(("stage", "seconds"), [[_t(name), f"{seconds:.3f}"] for name, seconds in explanation.seconds])


def _plans(explanation: Explanation) -> str:
    parts = []
    for number, graph in enumerate(explanation.graphs):
        if graph.plan is None:
            continue
        text = json.dumps(json.loads(graph.plan.to_json()), indent=1)
        name = f"graph {number}" + (f" ({graph.owner})" if graph.owner else "")
        parts.append(
            f"<details><summary>{_t(name)}, plan {_t(graph.plan.hash)}</summary><pre>{_t(text)}</pre></details>"
        )
    return "".join(parts)
