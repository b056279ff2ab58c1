"""Check one-hot dispatch with capacity: raised with the source's drops, bit for bit, and near misses left as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.compiler import all_dispatches
from effcompile.core.plan import Choice, Plan
from effcompile.core.verify import verify
from effcompile.lowering.moe.lower import lower_experts
from effcompile.passes.canonicalize import RemoveIdentities
from effcompile.passes.recognize.experts import RecognizedExperts, recognize_experts
from tests.support import experts as support
from tests.support.check import trace

E, M, H = 4, 8, 12


def top1(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Switch's gate in GShard's form: three factors, and a bool that says where."""
    gates = logits.softmax(-1)
    index = gates.argmax(1)
    mask = F.one_hot(index, E)
    places = torch.cumsum(mask, 0) - 1
    mask = mask * torch.lt(places, capacity)
    place = (places * mask).sum(1)
    weight = (gates * mask).sum(1)
    combine = torch.einsum("s,se,sc->sec", weight, mask.float(), F.one_hot(place, capacity).float())
    return combine, combine.bool()


def top2(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """GShard's two choices, the second behind all first ones, weights renormalized before drops."""
    gates = logits.softmax(-1)
    first = gates.argmax(1)
    mask1 = F.one_hot(first, E)
    second = logits.masked_fill(mask1.bool(), float("-inf")).argmax(1)
    mask2 = F.one_hot(second, E)
    places1 = torch.cumsum(mask1, 0) - 1
    places2 = torch.cumsum(mask2, 0) - 1 + mask1.sum(0, keepdim=True)
    weight1, weight2 = (gates * mask1).sum(1), (gates * mask2).sum(1)
    total = (weight1 + weight2).clamp(min=1e-9)
    weight1, weight2 = weight1 / total, weight2 / total
    mask1, mask2 = mask1 * torch.lt(places1, capacity), mask2 * torch.lt(places2, capacity)
    place1, place2 = (places1 * mask1).sum(1), (places2 * mask2).sum(1)
    gates1 = torch.einsum("s,se->se", weight1, mask1.float())
    gates2 = weight2[:, None] * mask2.float()
    combine = torch.einsum("se,sc->sec", gates1, F.one_hot(place1, capacity).float())
    combine = combine + gates2.unsqueeze(-1) * F.one_hot(place2, capacity).float().unsqueeze(1)
    return combine, combine > 0


def layer(gate: Callable[..., Any], capacity: int) -> Callable[..., Tensor]:
    def run(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        combine, dispatch = gate(logits, capacity)
        y = torch.einsum("sec,sm->ecm", dispatch.type_as(x), x)
        y = torch.einsum("ech,ehm->ecm", torch.einsum("ecm,emh->ech", y, w1).relu(), w2)
        return torch.einsum("sec,ecm->sm", combine.type_as(x), y)

    return run


def operands(tokens: int, seed: int = 0, skew: float = 0.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    logits = normal(tokens, E)
    logits[:, 1] += skew
    return normal(tokens, M), logits, normal(E, M, H) * M**-0.5, normal(E, H, M) * H**-0.5


def recognized(function: Callable[..., Any], *args: Tensor) -> RecognizedExperts:
    program = RemoveIdentities().run(trace(function, args), Plan.single("cpu")).program
    found = recognize_experts(program, lambda node: ("", ""))
    verify(program, found.program, "recognize experts")
    return found


def lowered(found: RecognizedExperts) -> Callable[..., Any]:
    plan = Plan.single("cpu", [Choice(site.id, "moe", "capacity") for site in found.sites])
    return lower_experts(found.program, plan, found.sites, all_dispatches()).entries[0].graph


@pytest.mark.parametrize("gate", [top1, top2])
@pytest.mark.parametrize(
    ("tokens", "capacity", "skew"),
    [(1, 1, 0.0), (9, 3, 0.0), (33, 3, 50.0), (33, 40, 0.0)],
    ids=["one", "few", "skewed", "all"],
)
def test_a_mixture_with_capacity_drops_what_its_source_drops(
    gate: Any, tokens: int, capacity: int, skew: float
) -> None:
    run, args = layer(gate, capacity), operands(tokens, 0, skew)
    found = recognized(run, *args)
    (site,) = found.sites
    assert not found.missed
    assert (site.tokens, site.top_k, site.experts, site.capacity) == (tokens, 1 if gate is top1 else 2, E, capacity)
    for graph in (found.program.entries[0].graph, lowered(found)):
        for seed in range(3):
            args = operands(tokens, seed, skew)
            made, wanted = graph(*args), run(*args)
            assert support.error(made, run(*(t.double() for t in args))) < 1e-5
            assert torch.equal((made == 0).all(1), (wanted == 0).all(1)), "other tokens were dropped"
    if skew:
        assert int((wanted == 0).all(1).sum()) > 10


def test_tokens_arrive_bit_for_bit_and_nothing_of_three_dimensions_is_left() -> None:
    def sent(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        combine, dispatch = top2(logits, 3)
        y = torch.einsum("sec,sm->ecm", dispatch.type_as(x), x)
        return y, torch.einsum("sec,ecm->sm", combine, y)

    args = operands(33)
    found = recognized(sent, *args)
    graph = lowered(found)
    assert torch.equal(graph(*args)[0], sent(*args)[0])  # type: ignore[operator]
    shapes = [tuple(node.meta["val"].shape) for node in graph.graph.nodes if hasattr(node.meta.get("val"), "shape")]  # type: ignore[attr-defined]
    assert (33, E, 3) not in shapes


def test_two_choices_of_one_place_are_added_before_they_are_compared() -> None:
    """Their weights cancel, so that the source sends nothing there; and it sends a token once where they do not."""

    def run(x: Tensor, ids: Tensor, places: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = F.one_hot(ids, E).float(), F.one_hot(places, 3).float()
        combine = torch.einsum("s,se,sc->sec", a, rows, columns) + torch.einsum("s,se,sc->sec", b, rows, columns)
        y = torch.einsum("sec,sm->ecm", combine.bool().type_as(x), x)
        return y, torch.einsum("sec,ecm->sm", combine, y)

    a = torch.tensor([0.5, 0.25, 1.0, 0.0])
    b = torch.tensor([-0.5, 0.5, 0.0, 0.0])
    args = (torch.randn(4, M), torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0]), a, b)
    found = recognized(run, *args)
    assert len(found.sites) == 1
    for graph in (found.program.entries[0].graph, lowered(found)):
        for made, wanted in zip(graph(*args), run(*args)):
            assert torch.equal(made, wanted)


def soft_places(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    mask = F.one_hot(logits.argmax(1), E).float()
    places = torch.linspace(0, 1, capacity).expand(logits.shape[0], capacity) + mask.sum(1, keepdim=True)
    combine = torch.einsum("se,sc->sec", mask, places)
    return combine, combine.bool()


def shifted(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    combine, _ = top1(logits, capacity)
    return combine, (combine - 0.25) > 0


def three_dims(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    combine, dispatch = top1(logits, capacity)
    return combine.softmax(-1), dispatch


@pytest.mark.parametrize("gate", [soft_places, shifted, three_dims])
def test_near_misses_stay_and_say_why(gate: Any) -> None:
    run, args = layer(gate, 5), operands(17)
    found = recognized(run, *args)
    assert not found.sites
    assert [item.refusal.code for item in found.missed] == ["EFF-M107"]
    torch.testing.assert_close(found.program.entries[0].graph(*args), run(*args))


def test_what_is_written_before_tokens_are_sent_keeps_the_source() -> None:
    def run(x: Tensor, weight: Tensor, ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight * 1.0
        combine = torch.einsum("s,se,sc->sec", weight, F.one_hot(ids, E).float(), F.one_hot(places, 3).float())
        weight.mul_(0.0)
        y = torch.einsum("sec,sm->ecm", combine.bool().type_as(x), x)
        return torch.einsum("sec,ecm->sm", combine, y), weight

    args = (torch.randn(3, M), torch.rand(3) + 0.5, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 2]))
    found = recognized(run, *args)
    assert [item.refusal.code for item in found.missed] == ["EFF-M106"]
    for made, wanted in zip(found.program.entries[0].graph(*args), run(*args)):
        assert torch.equal(made, wanted)


def test_a_graph_that_needs_gradients_keeps_the_source() -> None:
    program = RemoveIdentities().run(trace(layer(top2, 5), operands(17)), Plan.single("cpu")).program
    found = recognize_experts(replace(program, requires_grad=True), lambda node: ("", ""))
    assert not found.sites
    assert [item.refusal.code for item in found.missed] == ["EFF-A301"]


def test_a_result_that_nobody_sent_stays() -> None:
    def run(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return torch.einsum("sec,ecm->sm", top1(logits, 5)[0], x[:5].expand(E, 5, M))

    found = recognized(run, *operands(17))
    assert [item.refusal.code for item in found.missed] == ["EFF-M107"]


def test_compiled_layers_are_one_graph_and_a_site_each() -> None:
    import effcompile as eff

    def run(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        x = x + layer(top2, 6)(x, logits, w1, w2)
        return x + layer(top2, 9)(x, x[:, :E] - logits, w1, w2)

    args = operands(40)
    options = {"strict": True, "require": {"moe": "all"}, "emit": "interpreter"}
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(run, backend="eff", fullgraph=True, options=options)(*args)
    assert support.error(found, run(*(t.double() for t in args))) < 1e-5
    sites = eff.report()["graphs"][-1]["experts"]
    assert [(site["dispatch"], site["capacity"]) for site in sites] == [("capacity", 6), ("capacity", 9)]


@pytest.mark.parametrize("fixed", [True, False])
def test_the_number_of_tokens_may_be_a_symbol(fixed: bool) -> None:
    import effcompile as eff

    def run(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return layer(top1, 6 if fixed else x.shape[0] // E)(x, logits, w1, w2)

    torch._dynamo.reset()
    fast = torch.compile(
        run, backend="eff", fullgraph=True, dynamic=True, options={"strict": True, "emit": "interpreter"}
    )
    before = len(eff.report()["graphs"])
    with torch.no_grad():
        for tokens in (40, 24):
            x, logits, w1, w2 = operands(tokens)
            torch._dynamo.mark_static(w1)
            torch._dynamo.mark_static(w2)
            assert support.error(fast(x, logits, w1, w2), run(*(t.double() for t in (x, logits, w1, w2)))) < 1e-5
    sites = [site for graph in eff.report()["graphs"][before:] for site in graph["experts"]]
    assert len(sites) == (1 if fixed else 2), "a capacity is a number: that of a one-hot row"
    assert {site["dispatch"] for site in sites} == {"capacity"}
