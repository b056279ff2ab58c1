"""Compare two plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from effcompile.cli import parameters as given
from effcompile.cli.console import bad, good, print_json, stdout, table
from effcompile.core.plan import GraphPlan, Plan
from effcompile.planning.folding import fold

Old = Annotated[Path, typer.Argument(help="The plan before.", show_default=False)]
New = Annotated[Path, typer.Argument(help="The plan after.", show_default=False)]


@dataclass(frozen=True)
class Change:
    """Hold one difference: `what` is the family, `target` or `site`; '-' stands for nothing."""

    site: str
    what: str
    old: str
    new: str
    reason: str = ""


def diff(old: Old, new: New, as_json: given.AsJson = False) -> int:
    """Show side by side what two plans decide differently. Exit code 1 where they differ, else 0."""
    changes = compare(Plan.read(old), Plan.read(new))
    if as_json:
        print_json({"equal": not changes, "changes": [vars(change) for change in changes]})
    elif not changes:
        stdout().print(good("the plans decide the same"))
    else:
        grouped: dict[tuple[str, str, str, str], list[str]] = {}
        for change in changes:
            a, b = (_presence(change.old), _presence(change.new)) if change.what == "site" else (change.old, change.new)
            grouped.setdefault((change.what, a, b, change.reason), []).append(change.site)
        rows = [[fold(sites), what, bad(a), good(b), why] for (what, a, b, why), sites in grouped.items()]
        stdout().print(table("", ("site", "what", _title(old), _title(new), "why"), rows))
    return 1 if changes else 0


def compare(old: Plan, new: Plan) -> tuple[Change, ...]:
    """Return what differs: the target, sites that moved, came or went, and choices, with the new reason."""
    changes = [] if old.target == new.target else [Change("-", "target", old.target, new.target)]
    pairs = _pairs(old.graphs, new.graphs)
    for number, (before, after) in enumerate(pairs):
        changes.extend(_compare(before, after, f" {number}" if len(pairs) > 1 else ""))
    if old.schedule != new.schedule:
        changes.append(Change("-", "schedule", str(old.schedule or "-"), str(new.schedule or "-")))
    return tuple(changes)


def _compare(old: GraphPlan, new: GraphPlan, number: str) -> Iterator[Change]:
    prints = dict(old.fingerprints), dict(new.fingerprints)
    for site in sorted(prints[0].keys() | prints[1].keys()):
        a, b = (found.get(site, "-") for found in prints)
        if a != b:
            state = "gone" if b == "-" else "new" if a == "-" else "changed (shape, mask or spelling)"
            yield Change(_named(old, new, site), "site", a, b, state)
    choices = _choices(old), _choices(new)
    why = {(c.site, c.family): c.reason for c in new.choices}
    for item in new.declined:
        why.setdefault((item.site, _what(item.family, item.policy)), str(item.refusal))
    for site, what in sorted(choices[0].keys() | choices[1].keys()):
        a, b = (found.get((site, what), "-") for found in choices)
        if a != b:
            name = f"graph{number}" if what.startswith("pass ") else _named(old, new, site)
            yield Change(name, what, a, b, why.get((site, what), ""))
    if old.choices and new.choices and old.training != new.training:
        yield Change(f"graph{number}", "gradients", str(old.training).lower(), str(new.training).lower())


def _pairs(old: Sequence[GraphPlan], new: Sequence[GraphPlan]) -> list[tuple[GraphPlan, GraphPlan]]:
    """Put the graphs of two plans together: those of equal sites, then those that share most, then in order."""
    left, right = list(old), list(new)
    pairs: list[tuple[int, GraphPlan, GraphPlan]] = []
    while left and right:
        one, other = max(
            ((a, b) for a in left for b in right),
            key=lambda pair: (*_likeness(*pair), -old.index(pair[0]), -new.index(pair[1])),
        )
        pairs.append((old.index(one), one, other))
        left.remove(one)
        right.remove(other)
    pairs += [(old.index(one), one, GraphPlan(places=one.places)) for one in left]
    pairs += [(len(old) + new.index(other), GraphPlan(places=other.places), other) for other in right]
    return [(one, other) for _, one, other in sorted(pairs, key=lambda item: item[0])]


def _likeness(one: GraphPlan, other: GraphPlan) -> tuple[int, ...]:
    a, b = dict(one.fingerprints), dict(other.fingerprints)
    same = sum(b.get(site) == digest for site, digest in a.items())
    places = len(set(one.places) & set(other.places))
    return one.identity == other.identity, same, len(a.keys() & b.keys()), places, -abs(len(a) - len(b))


def _named(old: GraphPlan, new: GraphPlan, site: str) -> str:
    return fold((new if new.places else old).paths(site))


def _title(path: Path) -> str:
    return path.name if len(str(path)) > 24 else str(path)


def _presence(fingerprint: str) -> str:
    return "-" if fingerprint == "-" else "planned"


def _choices(plan: GraphPlan) -> Mapping[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for choice in plan.choices:
        runs = "runs" if choice.family == "pass" else plan.policy(choice.site, choice.family)
        found[choice.site, _what(choice.family, choice.policy)] = runs
    return found


def _what(family: str, policy: str) -> str:
    """Passes run side by side, so each is a decision of its own; of the other families one policy is chosen."""
    return f"pass {policy}" if family == "pass" else family
