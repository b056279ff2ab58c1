"""Write the results as one self-contained page: inline style, the picture inside, no script, nothing loaded."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from effcompile.demo.results import TITLES, Results, notes, site_groups, stage_seconds

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --dim: #667085; --line: #d8dee8; --page: #fff;
  --good: #1a7f4b; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #98a2b3; --line: #333c4d; --page: #12161f;
  --good: #4cc38a; --bad: #ff8a7a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 70rem; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; } th { text-align: left; color: var(--dim); }
th, td { padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
img { width: 100%; background: #fff; border-radius: 8px; } code { font: .85rem ui-monospace, monospace; }
.good { color: var(--good); } .bad { color: var(--bad); } .dim { color: var(--dim); } .wide { overflow-x: auto; }
"""


def page(results: Results, picture: Path, links: Sequence[tuple[str, str]] = ()) -> str:
    """Return the page; `links` are (file name, what it is) of files beside it."""
    image = base64.b64encode(picture.read_bytes()).decode()
    verdict = f'<p class="{"good" if results.agreed else "bad"}">{_t(results.verdict())}</p>'
    noise = "".join(f'<p class="bad">Noisy: {_t(line)}.</p>' for line in results.noise())
    parts = [
        f"<h1>{_t(results.model)}, three ways</h1>",
        f'<p class="dim">{_t(results.source)}. Text: {_t(results.text)}. Call: use_cache=False.</p>',
        verdict,
        noise,
        "".join(f"<p>{_t(line)}</p>" for line in results.remarks),
        _table(MEASURED, measured(results)),
        f'<p><img alt="Bars of latency, compile time and memory" src="data:image/png;base64,{image}"></p>',
        "<h2>What eff did</h2>",
        _table(SITES, sites(results)),
        "".join(f'<p class="dim">{_t(note)}</p>' for note in notes(results.report)),
        "<h2>Seconds by stage of eff's compilation, all lengths</h2>",
        _table(("stage", "seconds"), [(name, f"{value:.3f}") for name, value in stage_seconds(results.report)]),
        "<h2>Measured on</h2>",
        _table(("what", "value"), circumstances(results)),
        "".join(f'<p><a href="{_t(name)}">{_t(what)}</a></p>' for name, what in links),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>eff demo</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


MEASURED = (
    "tokens",
    "arm",
    "perplexity",
    "prefill",
    "fastest to slowest",
    "tokens/s",
    "against eager",
    "cold compile",
    "peak memory",
)


def measured(results: Results) -> list[tuple[str, ...]]:
    """Return one row of text a cell, under the columns `MEASURED`."""
    rows: list[tuple[str, ...]] = []
    for length in results.lengths:
        base = results.at(results.arms[0], length)
        for arm in results.arms:
            cell = results.at(arm, length)
            compiling = cell.compile_seconds
            rows.append(
                (
                    str(length),
                    TITLES.get(arm, arm),
                    f"{cell.perplexity:.4f}",
                    f"{cell.latency:.3f} s",
                    f"{min(cell.seconds):.3f} - {max(cell.seconds):.3f}",
                    f"{length / cell.latency:.0f}",
                    f"{base.latency / cell.latency:.2f}x",
                    "-" if compiling is None else f"{compiling:.1f} s",
                    f"{cell.peak / 1e9:.2f} GB",
                )
            )
    return rows


SITES = ("sites", "where", "shape", "mask", "kernel", "source")


def sites(results: Results) -> list[tuple[str, ...]]:
    """Return one row of text a group of equal sites, under the columns `SITES`."""
    return [(str(g.count), g.places, g.shape, g.mask, g.kernel, g.source) for g in site_groups(results.report)]


def circumstances(results: Results) -> list[tuple[str, str]]:
    """Return machine, versions and load as rows of text."""
    machine = results.machine
    load = results.loads[-1]
    others = max(item.others for item in results.loads)
    return [
        (
            "CPU",
            f"{machine['cpu']}, {machine['isa']}, {machine['cores']} usable cores, {machine['threads']} torch threads",
        ),
        ("memory", f"{machine['memory'] / 1e9:.1f} GB"),
        ("system", machine["system"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in results.versions.items())),
        ("load average", f"{results.loads[0].before:.2f} before, {load.after:.2f} after the timed calls"),
        ("used by others", f"{others:.2f} cores during the timed calls"),
        ("took", f"{results.seconds:.0f} s"),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_t(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{_t(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _t(value: object) -> str:
    return escape(str(value))
