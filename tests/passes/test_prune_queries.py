"""Run layers on chosen tokens alone: equal to masked execution of the same choice, with fewer operations; near misses stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

import effcompile as eff
from effcompile import ops
from effcompile.core.plan import Plan
from effcompile.models.recursions import RecursionConfig, Recursions
from effcompile.passes.canonicalize import RemoveIdentities
from effcompile.passes.prune_queries import PruneQueries
from tests.support.check import CPU, text, trace

ops.register()
TOKENS = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(1))


def model(recursions: int = 3, layers: int = 0, **changes: object) -> Recursions:
    torch.manual_seed(0)
    config = RecursionConfig.tiny(recursions, **changes)
    if layers:
        config = RecursionConfig(type(config.llama)(**{**vars(config.llama), "layers": layers}), recursions, **changes)
    made = Recursions(config).eval()
    for router in made.routers:
        torch.nn.init.normal_(router.weight, std=2.0)
    return made.requires_grad_(False)


def pruned(function: Callable[..., Tensor], *args: Tensor) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Run the pass twice; return its graph, and its notes."""
    plan = Plan.single(str(CPU))
    program = RemoveIdentities().run(trace(function, args), plan).program
    before = text(program)
    result = PruneQueries().run(program, plan)
    assert text(program) == before, "the pass changed the program that it was given"
    assert not PruneQueries().run(result.program, plan).changed
    return result.program.entries[0].graph, result.notes


def run_of(made: Recursions) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a model as a function of its weights, and what it is called with; further operands are its routing."""
    names = [name for name, _ in made.named_parameters()]

    def run(*args: Tensor) -> Tensor:
        weights, (ids, *routing) = dict(zip(names, args)), args[len(names) :]
        found: Tensor = torch.func.functional_call(made, weights, (ids, routing or None))
        return found

    return run, [*made.parameters(), TOKENS]


SLOW = pytest.mark.slow


@pytest.mark.parametrize("recursions", [pytest.param(2, marks=SLOW), 3, pytest.param(4, marks=SLOW)])
def test_recursions_run_on_their_tokens(recursions: int) -> None:
    """Exact in float64 under the model's own choice and under a given one; the last recursion really asks for k tokens."""
    made = model(recursions).double()
    wanted, routing = made.trace(TOKENS)
    run, args = run_of(made)
    graph, notes = pruned(run, *args)
    counts = made.config.kept(30)
    assert [note.split(" at ")[0] for note in notes] == [f"{count} of 30 tokens" for count in counts[1:]]
    assert torch.allclose(graph(*args), wanted, atol=1e-6)
    queries = [n.args[0].meta["val"].shape[2] for n in graph.graph.nodes if "scaled_dot" in str(n.target)]
    assert queries == [30, *(count for count in counts for _ in range(2)), 30]
    weights = [name for name, _ in made.named_parameters()].index("stack.0.mlp.gate_proj.weight")
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    assert len(inputs[weights].users) == recursions, "a tied weight is read where it is, in each recursion"
    given, _ = pruned(run, *args, *routing)
    assert torch.allclose(given(*args, *routing), wanted, atol=1e-6)


@SLOW
def test_the_stack_costs_two_thirds() -> None:
    """Of 3 recursions on all tokens: 1 + 2/3 + 1/3 recursions, queries, feed-forward and all."""
    made = model(3)
    run, args = run_of(made)
    graph, _ = pruned(run, *args)
    found = []
    for call in (run, graph):
        with FlopCounterMode(display=False) as counter:
            call(*args)
        found.append(counter.get_total_flops())
    outside = FlopCounterMode(display=False)
    with outside:
        made.last(made.first(made.embed(TOKENS), _rope(made), None), _rope(made), None) @ made.embed.weight.T
    masked, fewer = (value - outside.get_total_flops() for value in found)
    assert 0.64 < fewer / masked < 0.72  # keys of the first recursion are made for all tokens both times


def _rope(made: Recursions) -> tuple[Tensor, Tensor]:
    from effcompile.models.llama import rotary_tables

    return rotary_tables(torch.arange(30), made.config.llama.head_dim, made.config.llama.rope_theta)


def test_keys_of_their_own_are_those_of_the_chosen_tokens() -> None:
    """Under the model's own top-k, whose places are distinct, a recursion is a sequence of its tokens, keys and all."""
    deep = model(share_keys=False).double()
    run, args = run_of(deep)
    graph, notes = pruned(run, *args)
    counts = deep.config.kept(30)
    assert [note.split(" at ")[0] for note in notes] == [f"{count} of 30 tokens" for count in counts[1:]]
    assert torch.allclose(graph(*args), deep(TOKENS), atol=1e-6)
    attentions = [node for node in graph.graph.nodes if "scaled_dot" in str(node.target)]
    shapes = [tuple(arg.meta["val"].shape[2] for arg in node.args[:2]) for node in attentions]
    assert shapes == [(30, 30), *((count, count) for count in counts for _ in range(2)), (30, 30)]


def test_keys_of_their_own_need_every_token_under_a_routing_that_is_given() -> None:
    """A place that stands twice in it would count twice as a key; of one layer queries alone are pruned, of several nothing."""
    deep = model(share_keys=False)
    run, args = run_of(deep)
    _, notes = pruned(run, *args, *deep.route(TOKENS))
    assert len(notes) == 2
    assert all(note.startswith("EFF-R113") for note in notes)
    flat = model(3, layers=5, share_keys=False).double()
    run, args = run_of(flat)
    wanted, routing = flat.trace(TOKENS)
    graph, notes = pruned(run, *args, *routing)
    assert [note.split(" at ")[0] for note in notes] == ["20 of 30 tokens", "10 of 30 tokens"]
    assert torch.allclose(graph(*args, *routing), wanted, atol=1e-6)


@SLOW
def test_a_compiled_model_with_keys_of_its_own() -> None:
    made = model(share_keys=False)
    fast = torch.compile(made, backend="eff", dynamic=False, options={"strict": True})
    torch.testing.assert_close(fast(TOKENS), made(TOKENS), rtol=1e-4, atol=1e-4)
    sites = [site for graph in eff.report()["graphs"] for site in graph["sites"]]
    assert [site["kv_len"] for site in sites] == [30, *(n for n in made.config.kept(30) for _ in range(2)), 30]


def test_a_compiled_model_prunes() -> None:
    made = model()
    fast = torch.compile(made, backend="eff", dynamic=False, options={"emit": "interpreter", "strict": True})
    routing = made.route(TOKENS)
    torch.testing.assert_close(fast(TOKENS, routing), made(TOKENS, routing), rtol=1e-4, atol=1e-4)
    (graph,) = eff.report()["graphs"]
    assert sum("of 30 tokens at" in note for note in graph["notes"]) == 2


X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
W = torch.randn(16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
INDEX = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(n))[:5] for n in range(2)])


def chosen(x: Tensor, index: Tensor, base: bool = False, value: bool = True) -> Tensor:
    return torch.full(x.shape[:2], base).scatter(1, index, value)[..., None]


FITS: dict[str, Callable[..., Tensor]] = {
    "places in any order, one of them twice": lambda x, w, i: torch.where(
        chosen(x, torch.cat([i, i[:, :1]], 1)), x + F.linear(x, w), x
    ),
    "a share for each token": lambda x, w, i: torch.where(
        chosen(x, i), x + x.mean(-1, keepdim=True) * F.linear(F.layer_norm(x, (16,)), w), x
    ),
    "a value of all tokens": lambda x, w, i: torch.where(chosen(x, i), F.linear(x + x.cumsum(1), w), x),
    "a mask": lambda x, w, i: torch.where(chosen(x, i), F.linear(attended(x, torch.ones(12, 12).tril().bool()), w), x),
    "a mask for all queries": lambda x, w, i: torch.where(
        chosen(x, i), F.linear(attended(x, torch.ones(1, 12).bool()), w), x
    ),
    "a mask that hides the others": lambda x, w, i: own_keys(x, w, None),
}


def hidden(x: Tensor, index: Tensor) -> Tensor:
    return torch.zeros(x.shape[:2], dtype=torch.bool).scatter(1, index, True)[:, None, None, :]


def own_keys(x: Tensor, w: Tensor, mask: Tensor | None) -> Tensor:
    """Attend twice among the tokens of a top-k, or under another mask, and keep the result of these tokens."""
    kept = torch.zeros(x.shape[:2], dtype=torch.bool).scatter(1, x.sum(-1).topk(5, dim=1).indices, True)
    mask = kept[:, None, None, :] if mask is None else mask
    return torch.where(kept[..., None], F.linear(attended(attended(x, mask), mask), w), x)


def attended(x: Tensor, mask: Tensor) -> Tensor:
    heads = x.view(2, 12, 2, 8).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask).transpose(1, 2).reshape(2, 12, 16)


@pytest.mark.parametrize("name", FITS)
def test_what_works_token_by_token_is_pruned(name: str) -> None:
    graph, notes = pruned(FITS[name], X, W, INDEX)
    assert len(notes) == 1
    assert " of 12 tokens" in notes[0]
    linear = next(node for node in graph.graph.nodes if "linear" in str(node.target))
    assert linear.meta["val"].shape[1] in (5, 6)
    found, wanted = graph(X, W, INDEX), FITS[name](X, W, INDEX)
    assert torch.allclose(found, wanted, atol=1e-12)
    others = (wanted == X).all(-1)  # tokens that were not chosen
    assert int(others.sum()) >= 12
    assert torch.equal(found[others], X[others]), "not bit for bit what they were"


NEAR_MISSES: dict[str, Callable[..., Tensor]] = {
    "all but the index": lambda x, w, i: torch.where(chosen(x, i, True, False), F.linear(x, w), x),
    "more than the index": lambda x, w, i: torch.where(chosen(x, i, True), F.linear(x, w), x),
    "another value beside it": lambda x, w, i: torch.where(chosen(x, i), F.linear(x, w), x + 1),
    "a write": lambda x, w, i: torch.where(chosen(x, i), F.linear(x, w), x) + x.clone().add_(1),
    "every token is chosen": lambda x, w, i: torch.where(
        chosen(x, torch.cat([i, i, i], 1)), x + F.linear(x, w), x
    ),
    "tokens are mixed last": lambda x, w, i: torch.where(chosen(x, i), F.linear(x, w).cumsum(1), x),
    "the whole result is read": lambda x, w, i: (
        torch.where(chosen(x, i), y := F.linear(attended(x, torch.ones(1, 12).bool()), w), x) + y
    ),
    "another mask hides keys": lambda x, w, i: own_keys(x, w, hidden(x, i)),
    "no product": lambda x, w, i: torch.where(chosen(x, i), x * 2, x),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str) -> None:
    graph, notes = pruned(NEAR_MISSES[name], X, W, INDEX)
    assert not any(" of 12 tokens" in note for note in notes)
    assert torch.equal(graph(X, W, INDEX), NEAR_MISSES[name](X, W, INDEX))
