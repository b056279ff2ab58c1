"""Check that spellings which run all experts on all tokens are raised where weights are 0 outside the chosen, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.core.plan import Plan
from effcompile.core.verify import verify
from effcompile.passes.canonicalize import RemoveIdentities
from effcompile.passes.recognize.experts import RecognizedExperts, recognize_experts
from tests.support import experts as support
from tests.support.check import trace

T, H, INNER, E, K = 7, 16, 24, 5, 2


def gate(h: Tensor) -> Tensor:
    g, u = h.chunk(2, -1)
    return F.silu(g) * u


def sparse(logits: Tensor) -> Tensor:
    """Return scores of a sigmoid, 0 outside the top-k, as Llama 4's router."""
    value, ids = torch.topk(logits, K, dim=1)
    return torch.full_like(logits, float("-inf")).scatter_(1, ids, value).sigmoid()


def chosen(logits: Tensor) -> Tensor:
    value, ids = torch.topk(logits, K, dim=1)
    return torch.full_like(logits, float("-inf")).scatter(1, ids, value).softmax(-1)


def hot(logits: Tensor) -> Tensor:
    value, ids = torch.topk(logits.softmax(-1), K, dim=-1)
    return (F.one_hot(ids, E).to(value.dtype) * value.unsqueeze(-1)).sum(1)


def zeroed(logits: Tensor) -> Tensor:
    value, ids = torch.topk(logits.softmax(-1), K, dim=-1)
    return torch.zeros_like(logits).scatter(1, ids, value)


def llama4(x: Tensor, scores: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    rows = x.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)
    h = torch.bmm(rows.view(E, -1, H), w1.transpose(1, 2))
    return torch.bmm(gate(h), w2.transpose(1, 2)).view(-1, H).reshape(E, -1, H).sum(dim=0)


def weighted_sum(x: Tensor, scores: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    h = gate(torch.bmm(x.expand(E, -1, -1), w1.transpose(1, 2)))
    return (torch.bmm(h, w2.transpose(1, 2)) * scores.t()[:, :, None]).sum(0)


def einsum_et(x: Tensor, scores: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    y = torch.einsum("etf,edf->etd", gate(torch.einsum("td,efd->etf", x, w1)), w2)
    return torch.einsum("etd,te->td", y, scores)


def einsum_te(x: Tensor, scores: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    y = torch.einsum("edf, bef -> bed", w2, gate(torch.einsum("bd, efd -> bef", x, w1)))
    return torch.einsum("be, bed -> bd", scores, y)


def einsum_turned(x: Tensor, scores: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    y = torch.einsum("etf,efd->etd", gate(torch.einsum("td,edf->etf", x, w1.transpose(1, 2))), w2.transpose(1, 2))
    return torch.einsum("et,etd->td", scores.t(), y)


SPELLINGS = {f.__name__: f for f in (llama4, weighted_sum, einsum_et, einsum_te, einsum_turned)}
ROUTERS = {f.__name__: f for f in (sparse, chosen, hot, zeroed)}


def recognized(function: Callable[..., Any], *args: Tensor) -> RecognizedExperts:
    program = RemoveIdentities().run(trace(function, args), Plan.single("cpu")).program
    found = recognize_experts(program, lambda node: ("", ""))
    verify(program, found.program, "recognize experts")
    return found


def operands(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = support.make(T, H, INNER, E, K, seed=seed)
    return made.x, torch.randn(T, E, generator=torch.Generator().manual_seed(seed)), made.w1, made.w2


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_is_raised_and_means_the_same(spelling: str, router: str) -> None:
    def run(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return SPELLINGS[spelling](x, ROUTERS[router](logits), w1, w2)

    found = recognized(run, *operands())
    (site,) = found.sites
    assert not found.missed
    assert (site.tokens, site.top_k, site.experts, site.hidden, site.inner) == (T, K, E, H, INNER)
    assert site.side == ("in" if spelling == "llama4" else "out")
    assert f"top {K}" in site.router
    graph = found.program.entries[0].graph
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.bmm.default not in targets
    assert torch.ops.aten.einsum.default not in targets
    for seed in range(3):
        given = operands(seed)
        exact = run(*(t.double() for t in given))
        assert support.error(graph(*given), exact) < 1e-5


def soft(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def half(logits: Tensor) -> Tensor:
    """Scores below, not -inf, outside the top-k: their sigmoid is not 0."""
    value, ids = torch.topk(logits, K, dim=1)
    return torch.full_like(logits, -10.0).scatter(1, ids, value).sigmoid()


def ranked(logits: Tensor) -> Tensor:
    """Ids of an argsort may be anything to the recognizer."""
    ids = torch.argsort(logits, dim=-1)[:, :K]
    return torch.zeros_like(logits).scatter(1, ids, logits.gather(1, ids))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("router", [soft, half, ranked])
def test_weights_that_are_not_seen_to_be_zero_keep_the_source(spelling: str, router: Any) -> None:
    def run(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return SPELLINGS[spelling](x, router(logits), w1, w2)

    found = recognized(run, *operands())
    assert not found.sites
    assert [item.refusal.code for item in found.missed] == ["EFF-M102"]
    torch.testing.assert_close(found.program.entries[0].graph(*operands()), run(*operands()))


def biased(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor, bias: Tensor) -> Tensor:
    rows = x.repeat(E, 1) * sparse(logits).transpose(0, 1).reshape(-1, 1)
    h = torch.baddbmm(bias.unsqueeze(1), rows.view(E, -1, H), w1.transpose(1, 2))
    return torch.bmm(gate(h), w2.transpose(1, 2)).sum(dim=0)


def other_tokens(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor, bias: Tensor) -> Tensor:
    rows = x.repeat_interleave(E, 0) * sparse(logits).transpose(0, 1).reshape(-1, 1)
    return torch.bmm(gate(torch.bmm(rows.view(E, -1, H), w1.transpose(1, 2))), w2.transpose(1, 2)).sum(dim=0)


def mixed_order(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor, bias: Tensor) -> Tensor:
    """The last einsum sums over tokens: T and E are equal here, so that only the letters tell."""
    y = torch.einsum("etf,edf->etd", gate(torch.einsum("td,efd->etf", x, w1)), w2)
    return torch.einsum("etd,te->ed", y, hot(logits))


@pytest.mark.parametrize(
    ("function", "codes"),
    [(biased, {"EFF-M102"}), (other_tokens, {"EFF-M102"}), (mixed_order, {"EFF-M104"})],
)
def test_near_misses_stay(function: Any, codes: set[str]) -> None:
    x, logits, w1, w2 = operands()
    bias = torch.randn(E, 2 * INNER)
    found = recognized(function, x, logits, w1, w2, bias)
    assert not found.sites
    assert {item.refusal.code for item in found.missed} <= codes
    wanted = function(x, logits, w1, w2, bias)
    torch.testing.assert_close(found.program.entries[0].graph(x, logits, w1, w2, bias), wanted)


def test_llama_4_s_block_is_raised_as_it_is() -> None:
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    import effcompile as eff

    sizes = {"hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 24}
    block = Llama4TextMoe(Llama4TextConfig(**sizes, num_local_experts=4, num_experts_per_tok=1)).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 9, 32)
    options = {"strict": True, "require": {"moe": "all"}, "emit": "interpreter"}
    with torch.no_grad():
        found = torch.compile(block, backend="eff", fullgraph=True, options=options)(x)[0]
        assert support.error(found, block(x)[0].double()) < 1e-5
    (site,) = eff.report()["graphs"][-1]["experts"]
    assert (site["side"], site["idiom"], site["router"]) == ("in", "dense", "top 1, sigmoid of the chosen")


def test_an_einsum_of_an_input_is_no_mixture() -> None:
    def pooled(x: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("bsd,de->bse", x, w).relu().sum(1)

    found = recognized(pooled, torch.randn(2, T, H), torch.randn(H, INNER))
    assert not found.sites
    assert not found.missed
