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


def spelled(send: str, back: str, gate: Callable[..., Any] = top2) -> Callable[..., Tensor]:
    """Return the layer with its two products in other words."""

    def run(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        combine, dispatch = gate(logits, 5)
        dispatch, combine = dispatch.type_as(x), combine.type_as(x)
        tokens, experts, places = dispatch.shape
        sent = {
            "matmul": lambda: dispatch.permute(1, 2, 0) @ x,
            "flat": lambda: (dispatch.flatten(1).t() @ x).view(experts, places, M),
            "turned": lambda: dispatch.permute(1, 2, 0).reshape(-1, tokens) @ x,
            "bmm": lambda: torch.bmm(dispatch.permute(1, 2, 0), x.expand(experts, tokens, M)),
            "unsqueezed": lambda: torch.bmm(dispatch.permute(1, 2, 0), x.unsqueeze(0).expand(experts, -1, -1)),
            "tensordot": lambda: torch.tensordot(dispatch, x, dims=([0], [0])),
            "letters": lambda: torch.einsum("ted,tm->edm", dispatch, x),
            "swapped": lambda: torch.einsum("sm,ecs->ecm", x, dispatch.permute(1, 2, 0)),
        }[send]()
        y = sent.reshape(experts, places, M)
        y = torch.bmm(torch.bmm(y, w1).relu(), w2)
        made: Tensor = {
            "matmul": lambda: combine.view(tokens, -1) @ y.view(-1, M),
            "flat": lambda: torch.mm(combine.flatten(1), y.reshape(experts * places, M)),
            "tensordot": lambda: torch.tensordot(combine, y, 2),
            "bmm": lambda: torch.bmm(combine.permute(1, 0, 2), y).sum(0),
            "letters": lambda: torch.einsum("ecm,ces->sm", y, combine.permute(2, 1, 0)),
        }[back]()
        return made

    return run


def choices(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Both choices in one tensor, and a sum over them inside the product."""
    shares, ids = logits.softmax(-1).topk(2, -1)
    hot = F.one_hot(ids, E)
    flat = hot.transpose(0, 1).reshape(-1, E)
    places = ((flat.cumsum(0) - 1) * flat).sum(1).view(2, -1).t()
    kept = hot * (places < capacity)[..., None]
    rows = F.one_hot(places.clamp(max=capacity - 1), capacity).float()
    combine = torch.einsum("sk,ske,skc->sec", shares, kept.to(shares), rows.to(shares))
    return combine, combine > 0


def broadcast(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The same by broadcasting, in the order [S, C, E]."""
    shares, ids = logits.softmax(-1).topk(2, -1)
    places = torch.stack([torch.arange(len(logits)) % capacity, (torch.arange(len(logits)) + 1) % capacity], 1)
    experts = shares[..., None] * F.one_hot(ids, E).float()
    product = (F.one_hot(places, capacity).float()[..., None] * experts[:, :, None, :]).sum(1)
    return product.transpose(1, 2), product.transpose(1, 2).bool()


def turned_rows(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """One-hot rows as columns, and [E, S, C] in between."""
    hot = F.one_hot(logits.argmax(1), E)
    places = ((hot.cumsum(0) - 1) * hot).sum(1)
    kept = (hot * (places < capacity)[:, None]).float().t()
    rows = F.one_hot(places.clamp(max=capacity - 1), capacity).float()
    combine = torch.einsum("es,sc->esc", kept, rows).transpose(0, 1)
    return combine, combine.bool()


@pytest.mark.parametrize(
    ("send", "back", "gate"),
    [
        ("matmul", "matmul", top2),
        ("flat", "flat", top2),
        ("turned", "bmm", top1),
        ("bmm", "tensordot", top2),
        ("unsqueezed", "letters", top2),
        ("tensordot", "matmul", top1),
        ("letters", "bmm", choices),
        ("swapped", "flat", choices),
        ("matmul", "letters", broadcast),
        ("bmm", "matmul", turned_rows),
    ],
)
def test_other_spellings_and_layouts_are_read(send: str, back: str, gate: Any) -> None:
    run = spelled(send, back, gate)
    found = recognized(run, *operands(33))
    (site,) = found.sites
    assert not found.missed
    assert (site.tokens, site.experts, site.capacity, site.hidden) == (33, E, 5, M)
    assert site.top_k == (1 if gate in (top1, turned_rows) else 2)
    graph = lowered(found)
    shapes = [sorted(node.meta["val"].shape) for node in graph.graph.nodes if hasattr(node.meta.get("val"), "shape")]  # type: ignore[attr-defined]
    assert sorted((33, E, 5)) not in shapes
    for seed in range(3):
        args = operands(33, seed, 3.0 * seed)
        wanted = run(*args)
        for made in (found.program.entries[0].graph(*args), graph(*args)):
            assert support.error(made, run(*(t.double() for t in args))) < 1e-5
            assert torch.equal((made == 0).all(1), (wanted == 0).all(1)), "other tokens were dropped"


def test_a_factor_of_experts_alone_keeps_the_source() -> None:
    def run(x: Tensor, logits: Tensor, scale: Tensor) -> Tensor:
        hot, rows = F.one_hot(logits.argmax(1), E).float(), F.one_hot(torch.arange(9) % 5, 5).float()
        combine = torch.einsum("se,sc,e->sec", hot, rows, scale)
        y = torch.einsum("sec,sm->ecm", combine.bool().type_as(x), x)
        return torch.einsum("sec,ecm->sm", combine, y)

    args = (torch.randn(9, M), torch.randn(9, E), torch.rand(E))
    found = recognized(run, *args)
    assert [item.refusal.code for item in found.missed] == ["EFF-M107"]
    torch.testing.assert_close(found.program.entries[0].graph(*args), run(*args))


NEAR_MISSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "tokens of their own": lambda x, c, d: torch.bmm(d.permute(1, 2, 0), torch.stack([x, x, x, 2 * x])),
    "one dimension of three": lambda x, c, d: d.permute(1, 2, 0).softmax(-1) @ x,
    "another row order": lambda x, c, d: d.permute(1, 2, 0) @ x.flip(0),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_of_matrix_products_stay_or_stay_right(name: str) -> None:
    def run(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        combine, dispatch = top2(logits, 5)
        y = NEAR_MISSES[name](x, combine, dispatch.type_as(x))
        return combine.flatten(1) @ y.reshape(-1, M)

    args = operands(17)
    found = recognized(run, *args)
    assert len(found.sites) == (name == "another row order")
    torch.testing.assert_close(found.program.entries[0].graph(*args), run(*args))


def test_ordinary_products_beside_one_hot_rows_are_no_mixture() -> None:
    def run(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        rows = F.one_hot(ids, M).float()  # [1, S, M]
        return (x + rows).view(-1, M) @ w

    found = recognized(run, torch.randn(1, 1, M), torch.zeros(1, 1, dtype=torch.int64), torch.randn(M, H))
    assert not found.sites
    assert not found.missed


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
