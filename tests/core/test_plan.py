"""Check that a plan survives its file, that its hash covers the decisions only, and that graphs find their parts."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effcompile.core.errors import EffError
from effcompile.core.plan import Choice, Decline, GraphPlan, Plan
from effcompile.core.site import Refusal

names = st.sampled_from(["graph", "graph.0", "layers.0", "layers.1"])
prints = st.dictionaries(names, st.sampled_from(["1", "2"]), max_size=3)


@st.composite
def graphs(draw: st.DrawFn) -> GraphPlan:
    sites = draw(prints)
    kernels = [Choice(site, "attention-kernel", draw(st.sampled_from(["dense", "flex"])), "why", 1.0) for site in sites]
    passes = [Choice("graph", "pass", name) for name in draw(st.sets(st.sampled_from(["unpad", "outline"])))]
    declined = tuple(Decline(site, "pass", "unpad", Refusal("EFF-A401", "read")) for site in sites)
    return GraphPlan(
        (*kernels, *passes), declined, tuple(sites.items()), draw(st.booleans()), ("a note",), draw(st.just(("m",)))
    )


plans = st.lists(graphs(), max_size=4, unique_by=lambda graph: graph.identity).map(lambda g: Plan("cpu", tuple(g)))


@given(plans)
def test_a_file_holds_the_plan(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


@given(plans)
def test_every_graph_finds_its_part_and_no_other(plan: Plan) -> None:
    for graph in plan.graphs:
        part = plan.part(dict(graph.fingerprints), graph.training)
        assert part.graphs == (graph,)
        others = replace(plan, graphs=tuple(g for g in plan.graphs if g is not graph))
        with pytest.raises(EffError, match="nothing was applied") as caught:
            others.part(dict(graph.fingerprints), graph.training)
        assert caught.value.code == "EFF-P501"
    assert Plan.joined([plan, *(plan.part(dict(g.fingerprints), g.training) for g in plan.graphs)]).hash == plan.hash


@given(plans)
def test_the_hash_covers_decisions_only(plan: Plan) -> None:
    orders = {Plan("cpu", order).hash for order in permutations(plan.graphs)}
    assert orders == {plan.hash}
    bare = [replace(g, declined=(), notes=(), places=(), choices=_without_prose(g)) for g in plan.graphs]
    assert replace(plan, graphs=tuple(bare)).hash == plan.hash
    assert replace(plan, target="sm_90").hash != plan.hash
    for number, graph in enumerate(plan.graphs):
        changed = replace(graph, choices=(*graph.choices, Choice("graph", "pass", "another")))
        assert replace(plan, graphs=(*plan.graphs[:number], changed, *plan.graphs[number + 1 :])).hash != plan.hash
        assert changed.identity == graph.identity


def _without_prose(graph: GraphPlan) -> tuple[Choice, ...]:
    return tuple(Choice(c.site, c.family, c.policy) for c in graph.choices)


def test_parts_that_disagree_are_not_joined() -> None:
    one = Plan.single("cpu", [Choice("a", "attention-kernel", "flex")], fingerprints=(("a", "1"),))
    other = Plan.single("cpu", [Choice("a", "attention-kernel", "dense")], fingerprints=(("a", "1"),))
    for pair in ((one, other), (one, replace(one, target="sm_90"))):
        with pytest.raises(EffError) as caught:
            Plan.joined(pair)
        assert caught.value.code == "EFF-P507"
    places = Plan.joined([one.with_places(["x", ""]), one.with_places(["y", "x"])]).graphs[0].places
    assert places == ("x", "y")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"schema": 1}, "plan schema 1, this version reads 2"),
        ({"graphs": [{}]}, "not a plan"),
        ({"target": "sm_90"}, "the decisions hash to"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(changes: dict[str, object], text: str) -> None:
    told = {**json.loads(Plan.single("cpu").to_json()), **changes}
    with pytest.raises(EffError, match=text) as caught:
        Plan.from_json(json.dumps(told))
    assert caught.value.code == "EFF-P503"
    assert "next:" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "3", '"plan"', "null", "{}"])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(EffError, match="not a plan"):
        Plan.from_json(text)


def test_a_graph_that_is_there_twice_is_refused() -> None:
    graph = GraphPlan(fingerprints=(("a", "1"),))
    with pytest.raises(EffError, match="same sites"):
        Plan.from_json(Plan("cpu", (graph, graph)).to_json())


def test_the_error_names_the_nearest_graph() -> None:
    plan = Plan("cpu", tuple(GraphPlan(fingerprints=((f"a.{n}", "1"), (f"b.{n}", "1"))) for n in range(2)))
    with pytest.raises(EffError, match=r"1 sites changed \(b.1\); 1 sites new \(c\); nothing"):
        plan.part({"a.1": "1", "b.1": "2", "c": "1"})
    with pytest.raises(EffError, match="gradients"):
        plan.part({"a.1": "1", "b.1": "1"}, training=True)
    with pytest.raises(EffError, match="without sites"):
        plan.part({})
    with pytest.raises(EffError, match="nothing was applied"):
        Plan("cpu").part({"a": "1"})
