"""Hold every decision as one JSON value.

After the plan everything is mechanical: a wrong number is either a wrong plan or a wrong rewrite. Graph breaks cut a model into
graphs, and the backend sees one at a time: a plan holds a part for each, which a graph finds by the fingerprints of its sites. The
hash covers the decisions only, so that prose and estimates may improve without invalidating a cache. Where a symbolic size decides
between two kernels, a part holds the choices for both ranges of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from effcompile.core.errors import EffError, unknown
from effcompile.core.site import Refusal, place

SCHEMA = 2


Range = Literal["any", "below", "above"]


@dataclass(frozen=True)
class Split:
    """Cut the values of a symbolic size in two: `below` is less than `at`, `above` is `at` and more.

    `size` is its name in the shapes of sites (`s27`), `source` the input that has it (`x.size()[1]`).
    """

    size: str
    at: int
    source: str = ""

    def side(self, value: int) -> Range:
        """Return the range that a value lies in."""
        return "below" if value < self.at else "above"

    def text(self, side: Range) -> str:
        """Return `s27 < 812`, `s27 >= 812`, or nothing."""
        return {"any": "", "below": f"{self.size} < {self.at}", "above": f"{self.size} >= {self.at}"}[side]


@dataclass(frozen=True)
class Choice:
    """Say what happens at one site for one family; `policy` is a kernel or a spelled policy.

    `range` is the part of the split size's values for which it happens.
    """

    site: str
    family: str
    policy: str
    reason: str = ""
    seconds: float | None = None
    tag: str = "modelled"
    range: Range = "any"


@dataclass(frozen=True)
class Decline:
    """Say what did not happen at one site, and why."""

    site: str
    family: str
    policy: str
    refusal: Refusal
    source: str = ""


@dataclass(frozen=True)
class GraphPlan:
    """Hold the choices for one graph.

    `fingerprints` maps each of its sites to what the choices were made for, `training` tells whether gradients flow
    through it: together they are what the graph is known by. `places` are the modules that it was run for, where a dry
    run saw them; they are for readers.
    """

    choices: tuple[Choice, ...] = ()
    declined: tuple[Decline, ...] = ()
    fingerprints: tuple[tuple[str, str], ...] = ()
    training: bool = False
    notes: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    split: Split | None = None

    @property
    def identity(self) -> str:
        """Return a digest of what the graph is known by."""
        return _digest([self.training, sorted(self.fingerprints)])

    @property
    def decisions(self) -> tuple[tuple[str, ...], ...]:
        """Return the (site, family, policy, range) of every choice, sorted, and where a size is split."""
        choices = sorted((c.site, c.family, c.policy, c.range) for c in self.choices)
        return (*choices, *([("split", self.split.size, str(self.split.at))] if self.split else []))

    def within(self, side: Range) -> GraphPlan:
        """Return the part with the choices for one range of the split size alone."""
        return replace(self, choices=tuple(c for c in self.choices if side == "any" or c.range in ("any", side)))

    def policy(self, site: str, family: str) -> str:
        """Return the policy for a site in words, of both ranges where a size is split."""
        found = {c.range: c.policy for c in self.choices if c.site == site and c.family == family}
        if self.split is None or "any" in found:
            return next(iter(found.values()), "")
        policies = dict.fromkeys(found.values())
        if len(policies) == 1:
            return next(iter(policies))
        return ", ".join(f"{policy} ({self.split.text(side)})" for side, policy in found.items())

    def paths(self, site: str) -> tuple[str, ...]:
        """Return where in the module tree a site of this graph is: one path for every module that it was run for."""
        return tuple(dict.fromkeys(place(owner, site) for owner in self.places or ("",)))


@dataclass(frozen=True)
class Plan:
    """Hold the choices for one target, graph by graph. A stage of one graph gets a plan with that graph's part alone."""

    target: str
    graphs: tuple[GraphPlan, ...] = ()
    schedule: dict[str, Any] | None = field(default=None, hash=False)

    @classmethod
    def single(cls, target: str, choices: Iterable[Choice] = (), **fields: Any) -> Plan:
        """Return the plan of one graph; `fields` are those of `GraphPlan`."""
        return cls(target, (GraphPlan(tuple(choices), **fields),))

    @classmethod
    def joined(cls, plans: Iterable[Plan]) -> Plan:
        """Return one plan with the graphs of several: those of a model in order, a graph that is there twice once.

        Raises EFF-P507 where two plans are for different targets, or decide differently for the same graph.
        """
        given = tuple(plans)
        assert given, "no plan to join"
        graphs: dict[str, GraphPlan] = {}
        for plan in given:
            if plan.target != given[0].target or plan.schedule != given[0].schedule:
                raise EffError("EFF-P507", f"plans for {given[0].target} and for {plan.target} are not one plan")
            for graph in plan.graphs:
                known = graphs.get(graph.identity)
                if known is not None and known.decisions != graph.decisions:
                    names = ", ".join(site for site, _ in graph.fingerprints[:3]) or "a graph without sites"
                    raise EffError("EFF-P507", f"two parts of the plan decide differently for the same graph: {names}")
                graphs[graph.identity] = graph if known is None else _merged(known, graph)
        return replace(given[0], graphs=tuple(graphs.values()))

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Return the choices of all graphs."""
        return tuple(choice for graph in self.graphs for choice in graph.choices)

    @property
    def declined(self) -> tuple[Decline, ...]:
        """Return what was declined in all graphs."""
        return tuple(item for graph in self.graphs for item in graph.declined)

    @property
    def fingerprints(self) -> tuple[tuple[str, str], ...]:
        """Return the fingerprints of the sites of all graphs; two graphs may use the same name of a site."""
        return tuple(pair for graph in self.graphs for pair in graph.fingerprints)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return the notes of all graphs."""
        return tuple(note for graph in self.graphs for note in graph.notes)

    def of(self, site: str, family: str) -> Choice | None:
        """Return the choice for a site and family; ask a plan of one graph, since graphs may share names of sites."""
        return next((c for c in self.choices if c.site == site and c.family == family), None)

    def policy(self, site: str, family: str) -> str:
        """Return the policy for a site in words, of both ranges where a size is split; ask a plan of one graph."""
        return next((text for graph in self.graphs if (text := graph.policy(site, family))), "")

    def within(self, side: Range) -> Plan:
        """Return the plan with the choices for one range of a split size alone, so that `of` finds those."""
        return replace(self, graphs=tuple(graph.within(side) for graph in self.graphs))

    @property
    def split(self) -> Split | None:
        """Return where a symbolic size is split; ask a plan of one graph."""
        return next((graph.split for graph in self.graphs if graph.split is not None), None)

    def passes(self) -> tuple[str, ...]:
        """Return the names of the graph passes that run; ask a plan of one graph."""
        return tuple(c.policy for c in self.choices if c.family == "pass")

    def with_choice(self, choice: Choice) -> Plan:
        """Return the plan with a choice in the place of those for the same site and family; ask a plan of one graph."""

        def replaced(choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
            same = [(old.site, old.family) == (choice.site, choice.family) for old in choices]
            first = same.index(True) if any(same) else None
            return tuple(choice if n == first else old for n, old in enumerate(choices) if n == first or not same[n])

        return replace(self, graphs=tuple(replace(graph, choices=replaced(graph.choices)) for graph in self.graphs))

    def with_more(self, choices: Iterable[Choice], declined: Iterable[Decline]) -> Plan:
        """Return the plan with choices and declines added to its last graph."""
        *first, last = self.graphs
        more = replace(last, choices=(*last.choices, *choices), declined=(*last.declined, *declined))
        return replace(self, graphs=(*first, more))

    def with_notes(self, notes: Iterable[str]) -> Plan:
        """Return the plan with notes added to its last graph."""
        *first, last = self.graphs
        return replace(self, graphs=(*first, replace(last, notes=(*last.notes, *notes))))

    def with_places(self, places: Iterable[str]) -> Plan:
        """Return the plan with the modules that its graphs were run for."""
        named = tuple(dict.fromkeys(name for name in places if name))
        return replace(self, graphs=tuple(replace(graph, places=named) for graph in self.graphs))

    @property
    def hash(self) -> str:
        """Return a digest of the decisions. The order in which graphs were seen is none."""
        parts = sorted(json.dumps([g.training, g.decisions, sorted(g.fingerprints)]) for g in self.graphs)
        return _digest([SCHEMA, self.target, parts, self.schedule])

    def part(self, fingerprints: Mapping[str, str], training: bool = False) -> Plan:
        """Return the plan of the one graph that has these sites; raise EFF-P501 where no graph of the plan has them."""
        wanted = GraphPlan(fingerprints=tuple(fingerprints.items()), training=training).identity
        for graph in self.graphs:
            if graph.identity == wanted:
                return replace(self, graphs=(graph,))
        raise EffError(
            "EFF-P501",
            f"the plan was made for another model or version: {self._unlike(fingerprints, training)}; nothing was applied",
            hint="eff plan MODEL -o plan.json, then eff diff old.json plan.json",
        )

    def _unlike(self, fingerprints: Mapping[str, str], training: bool) -> str:
        """Say how a graph differs from the planned graph that is most like it."""
        known = set(fingerprints.items())
        if any(set(graph.fingerprints) == known for graph in self.graphs):
            made = "gradients, this graph runs without any" if not training else "inference, this graph needs gradients"
            return f"it is for {made}"
        if not known:
            return "it has no graph without sites"

        def likeness(graph: GraphPlan) -> tuple[int, int, int]:
            mine = dict(graph.fingerprints)
            shared = mine.keys() & fingerprints.keys()
            same = sum(mine[site] == fingerprints[site] for site in shared)
            return same, len(shared), -len(mine)

        nearest = dict(max(self.graphs, key=likeness).fingerprints) if self.graphs else {}
        shared = nearest.keys() & fingerprints.keys()
        changed = sorted(site for site in shared if nearest[site] != fingerprints[site])
        # A planned graph that has no site in common with this one is not what it once was: it is another graph.
        gone = sorted(nearest.keys() - fingerprints.keys()) if shared or len(self.graphs) == 1 else []
        kinds = ((changed, "changed"), (gone, "gone"), (sorted(fingerprints.keys() - shared), "new"))
        return "; ".join(f"{len(names)} sites {word} ({', '.join(names[:3])})" for names, word in kinds if names)

    def to_json(self) -> str:
        """Return the plan as readable JSON with a schema number and its hash."""
        return json.dumps({"schema": SCHEMA, "hash": self.hash, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote; a plan of another schema or with a wrong hash is refused (EFF-P503)."""
        try:
            raw = json.loads(text)
            schema, digest = raw.pop("schema"), raw.pop("hash")
            if schema != SCHEMA:
                raise EffError(
                    "EFF-P503",
                    f"plan schema {schema}, this version reads {SCHEMA}",
                    hint="make it again: eff plan MODEL -o plan.json",
                )
            plan = cls(raw["target"], tuple(map(_graph, raw["graphs"])), raw["schedule"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EffError("EFF-P503", f"not a plan: {error}", hint="eff plan MODEL -o plan.json") from error
        if len({graph.identity for graph in plan.graphs}) != len(plan.graphs):
            raise EffError("EFF-P503", "two graphs of the plan have the same sites", hint="eff plan MODEL -o plan.json")
        if digest and digest != plan.hash:  # a person may edit a plan: an emptied hash says so
            raise EffError(
                "EFF-P503",
                f"the decisions hash to {plan.hash}, the file says {digest}",
                hint='after editing a plan set "hash": ""',
            )
        return plan

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Read a plan file."""
        file = Path(path)
        if not file.is_file():
            raise EffError("EFF-P503", f"no plan file `{file}`", hint="eff plan MODEL -o plan.json")
        return cls.from_json(file.read_text())


def _graph(raw: Mapping[str, Any]) -> GraphPlan:
    fields = {
        **raw,
        "choices": tuple(Choice(**c) for c in raw["choices"]),
        "declined": tuple(Decline(**{**d, "refusal": Refusal(**d["refusal"])}) for d in raw["declined"]),
        "fingerprints": tuple((str(site), str(digest)) for site, digest in raw["fingerprints"]),
        "notes": tuple(raw["notes"]),
        "places": tuple(raw["places"]),
        "split": None if raw["split"] is None else Split(**raw["split"]),
    }
    for choice in fields["choices"]:
        if choice.range not in get_args(Range):
            raise unknown("EFF-P503", "range of a choice", choice.range, get_args(Range))
        if choice.range != "any" and fields["split"] is None:
            raise ValueError(f"a choice for sizes `{choice.range}` a split, and no split")
    return GraphPlan(**fields)


def _merged(one: GraphPlan, other: GraphPlan) -> GraphPlan:
    """Return one part for a graph that was met twice: the same decisions, the places and reasons of both."""
    return replace(
        one,
        declined=tuple(dict.fromkeys((*one.declined, *other.declined))),
        notes=tuple(dict.fromkeys((*one.notes, *other.notes))),
        places=tuple(dict.fromkeys((*one.places, *other.places))),
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
