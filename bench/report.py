"""Turn result documents into a terminal table and into the results section of the README."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.case import Settings
from effcompile.core.errors import EffError

if TYPE_CHECKING:
    from rich.table import Table

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
OURS = "eff"


def table(document: Mapping[str, Any]) -> Table:
    """Return a rich table: a line a row, a column an arm with median, half quartile range and ratio to the baseline."""
    from effcompile.cli.console import table as plain_table

    arms = arm_names(document)
    names = [name.replace("-", " ") for name in arms]  # so that they wrap
    best = {row["id"]: versus_best(row) for row in document["rows"]}
    last = ("against the fastest peer",) if any(best.values()) else ()
    rows = []
    for row in document["rows"]:
        cells = [_cell(document, row, name, [], wide=True) for name in arms]
        rows.append([row["id"], *cells, *([best[row["id"]]] if last else [])])
    return plain_table(f"{document['title']} ({document['tag']})", ("row", *names, *last), rows, right=(*names, *last))


def failures(document: Mapping[str, Any]) -> list[str]:
    """Return the rows in which an arm of ours failed or is less exact than the rule allows."""
    ours = [(row["id"], arm) for row in document["rows"] for name, arm in row["arms"].items() if name.startswith(OURS)]
    return [row for row, arm in ours if "error" in arm or arm.get("numerics", {}).get("within") is False]


def problems(document: Mapping[str, Any]) -> list[str]:
    """Return a line for each reason why an arm failed, was skipped, is inexact or recompiled, with its rows.

    A kernel that does not run a mask is no problem, so tables of kernels report failures only.
    """
    found: dict[str, list[str]] = {}
    for row in document["rows"]:
        for name, arm in row["arms"].items():
            if "error" in arm:
                found.setdefault(f"{name} failed: {arm['error']}", []).append(row["id"])
            elif "skipped" in arm and document["headline"]:
                found.setdefault(f"{name} skipped: {arm['skipped']}", []).append(row["id"])
            elif arm.get("numerics", {}).get("within") is False:
                found.setdefault(f"{name} {_WRONG}", []).append(row["id"])
        if row.get("recompiled"):
            found.setdefault("graphs were compiled again during the rounds", []).append(row["id"])
    return [f"{text} ({', '.join(rows)})" for text, rows in found.items()]


_WRONG = "differs from float64 more than the rule allows"


def arm_names(document: Mapping[str, Any]) -> list[str]:
    """Return the arms of all rows, in the order they first appear."""
    return list(dict.fromkeys(name for row in document["rows"] for name in row["arms"]))


def versus_best(row: Mapping[str, Any]) -> str:
    """Return eff's ratio to the fastest other compiler or runtime of the row, with its name; '' where there is none."""
    mine = [item for item in row["ratios"] if item["arm"] == OURS and not item["to"].startswith(OURS)]
    if not mine:
        return ""
    best = min(mine, key=lambda item: item["median"])
    return f"{best['median']:.2f}x {best['to']}"


def _cell(
    document: Mapping[str, Any], row: Mapping[str, Any], name: str, notes: list[str], *, wide: bool = False
) -> str:
    arm = row["arms"].get(name)
    if arm is None:
        return ""
    if "error" in arm or "skipped" in arm:
        note = "" if wide else _note(notes, arm.get("error") or arm["skipped"])
        return ("failed" if "error" in arm else "-") + note
    text = amount(document["unit"], arm)
    if wide and "seconds" in arm and arm["seconds"]["median"] > 0:
        text += f" ±{50 * arm['seconds']['iqr'] / arm['seconds']['median']:.0f}%"
    base = next(iter(row["arms"]))
    found = next((item for item in row["ratios"] if item["arm"] == name and item["to"] == base), None)
    if found is not None:
        text += f"\n{found['median']:.2f}x" if wide else f" ({found['median']:.2f}x)"
    if arm.get("numerics", {}).get("within") is False:
        text += " inexact" if wide else _note(notes, _WRONG)
    return text


def amount(unit: str, arm: Mapping[str, Any]) -> str:
    """Return an arm's figure with its unit: GFLOP/s where it has a rate, else time or memory."""
    if "gflops" in arm:
        return f"{arm['gflops']:.4g} GFLOP/s"
    value = arm["bytes"]["call_peak"] if unit == "bytes" else arm["seconds"]["median"]
    return " ".join(_scale(unit, value))


def _scale(unit: str, value: float) -> tuple[str, str]:
    if unit == "bytes":
        return f"{value / 2**30:.2f}", "GiB"
    if unit == "compilation" or value >= 10:
        return f"{value:.1f}", "s"
    return (f"{value * 1e3:.3g}", "ms") if value < 1 else (f"{value * 1e3:.0f}", "ms")


def _note(notes: list[str], text: str) -> str:
    if text not in notes:
        notes.append(text)
    return f" [{notes.index(text) + 1}]"


def caption(document: Mapping[str, Any]) -> str:
    """Return what a case measures and the circumstances of its runs, a line each."""
    return "\n".join([document["about"], *circumstances(document)])


def circumstances(document: Mapping[str, Any]) -> list[str]:
    """Return a line for each set of runs that differ in the commit alone: date, chip, threads, versions, commits."""
    commits: dict[str, list[str]] = {}
    for manifest in document["runs"].values():
        known = commits.setdefault(machine(manifest), [])
        if (name := commit(manifest)) not in known:
            known.append(name)
    return [
        f"{text}, {'commits' if len(names) > 1 else 'commit'} {', '.join(names)}" for text, names in commits.items()
    ]


def machine(manifest: Mapping[str, Any]) -> str:
    """Return one line: date, chip, threads and versions of a run."""
    versions = manifest["versions"]
    peers = ", ".join(
        f"{name} {versions[name]}"
        for name in ("torch", "transformers", "onnxruntime", "openvino")
        if versions.get(name)
    )
    return f"{manifest['date'][:10]}, {chip(manifest)}, {manifest['threads']} threads, {peers}"


def commit(manifest: Mapping[str, Any]) -> str:
    """Return the commit of a run, with a plus where the working tree was changed."""
    return (manifest["commit"].get("hash") or "unknown")[:10] + ("+" if manifest["commit"].get("modified") else "")


def chip(manifest: Mapping[str, Any]) -> str:
    """Return the name of the chip of a run, with what its instruction set adds: two chips may share a vague name."""
    if manifest.get("gpu"):
        return str(manifest["gpu"]["name"])
    return f"{manifest['cpu']['model']} ({manifest['cpu'].get('family') or manifest['cpu']['isa']})"


def markdown(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return the README's results: for each machine a table a case, with its circumstances and the reasons of what is missing."""
    parts = [
        "All figures are measured (none modelled) by `eff bench`: medians of rounds in which the arms take turns. In "
        "parentheses: how many times as fast as the first column, from ratios taken round by round. `against the "
        "fastest peer` is the smallest of eff's ratios."
    ]
    shown = [document for document in documents if document["headline"] and document["rows"]]
    for name in dict.fromkeys(document["machine"] for document in shown):
        mine = [document for document in shown if document["machine"] == name]
        chips = dict.fromkeys(chip(m) for document in mine for m in document["runs"].values())
        parts += [f"### On {' and '.join(chips)}", *(section(document) for document in mine)]
    return "\n\n".join(parts)


def section(document: Mapping[str, Any]) -> str:
    """Return one case as Markdown."""
    notes: list[str] = []
    arms = arm_names(document)
    place = "" if document["device"] == "cpu" else f" on {document['device']}"
    lines = [f"#### {document['title']}{place}", "", document["about"], ""]
    lines.append("| row | " + " | ".join(arms) + " | against the fastest peer |")
    lines.append("| --- |" + " ---: |" * (len(arms) + 1))
    for row in document["rows"]:
        cells = [_cell(document, row, name, notes) for name in arms]
        lines.append("| " + " | ".join([row["id"], *cells, versus_best(row)]) + " |")
    lines.append("")
    for number, note in enumerate(notes, 1):
        lines.append(f"[{number}] {_plain(note)}  ")
    spreads = [arm["seconds"] for row in document["rows"] for arm in row["arms"].values() if "seconds" in arm]
    if spreads:
        widest = max(spread["iqr"] / spread["median"] for spread in spreads if spread["median"] > 0)
        rounds = sorted({row["rounds"] for row in document["rows"]})
        lines.append(
            f"Rounds: {', '.join(map(str, rounds))}; widest quartile range {100 * widest:.1f} % of its median.  "
        )
    lines += [f"measured: {text}  " for text in circumstances(document)]
    return "\n".join(lines).rstrip()


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "/").replace("<", "&lt;").split())


def latest(documents: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return (document, row) of the last run of each row, whichever machine made it."""
    found: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for document in documents:
        for row in document["rows"]:
            if row["id"] not in found or found[row["id"]][1]["run"] < row["run"]:
                found[row["id"]] = document, row
    return list(found.values())


def replace_results(text: str, body: str) -> str:
    """Return the text of a page with `body` between the markers.

    Raises:
        EffError: EFF-B104 unless each marker is there once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise EffError("EFF-B104", f"the page needs the line {BEGIN} and, after it, {END}, once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{body.strip()}\n{END}{rest.split(END)[1]}"


def write_page(page: Path, body: str, draw: Callable[[], object] = lambda: None) -> bool:
    """Put `body` between the markers of a page, and draw its picture anew where that changed it; return whether it did.

    Raises:
        EffError: EFF-B104 where the page or its markers are missing.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise EffError("EFF-B104", f"cannot read {page.name}: {error.strerror}") from error
    new = replace_results(text, body)
    if new != text:
        page.write_text(new, encoding="utf-8")
        draw()
    return new != text


def write_readme(path: Path, documents: Sequence[Mapping[str, Any]]) -> bool:
    """Put the results into a README; return whether it changed."""
    return write_page(path, markdown(documents))


def list_table(items: Sequence[Mapping[str, Any]], settings: Settings) -> Table:
    """Return the table of `eff bench --list`."""
    from effcompile.cli.console import table as plain_table

    lines = []
    for item in items:
        shown = ", ".join(item["rows"][:3]) + (f" ... ({len(item['rows'])})" if len(item["rows"]) > 3 else "")
        others = f" (on request: {', '.join(item['other_arms'])})" if item["other_arms"] else ""
        lines.append([item["case"], item["title"], shown, ", ".join(item["arms"]) + others])
    return plain_table(f"Cases on {settings.device}", ("case", "measures", "rows", "arms"), lines)
