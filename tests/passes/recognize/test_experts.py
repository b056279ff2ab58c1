"""Check that spellings of experts are raised, with their operands, and that near misses stay as they are, with their reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.core.experts import Gate
from effcompile.core.plan import Plan
from effcompile.core.verify import verify
from effcompile.passes.canonicalize import RemoveIdentities
from effcompile.passes.recognize.experts import RecognizedExperts, recognize_experts
from tests.support import experts as support
from tests.support.check import trace

OSS = Gate("silu", "interleaved", alpha=1.702, beta=1.0, limit=1.0)
Body = Callable[..., Tensor]


def oss(h: Tensor) -> Tensor:
    g, u = h[..., ::2].clamp(max=1.0), h[..., 1::2].clamp(-1.0, 1.0)
    return (u + 1) * (g * torch.sigmoid(g * 1.702))


def swiglu(h: Tensor) -> Tensor:
    g, u = h.chunk(2, -1)
    return F.silu(g) * u


def upcast(h: Tensor) -> Tensor:
    g, u = h.split(h.shape[-1] // 2, -1)
    return (u.float() * F.gelu(g.float(), approximate="tanh")).to(h.dtype)


def plain(h: Tensor) -> Tensor:
    return F.relu(h).square()


GATES: dict[str, tuple[Gate, Body]] = {
    "swiglu": (Gate(), swiglu),
    "oss": (OSS, oss),
    "geglu": (Gate("gelu_tanh"), upcast),
    "relu2": (Gate("relu2", "none"), plain),
}


def grouped(gate: Body, turned: bool = False) -> Body:
    def run(x: Tensor, ids: Tensor, w: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        top_k, flat = ids.shape[1], ids.reshape(-1)
        known, order = torch.sort(flat)
        offs = torch.cumsum(torch.bincount(known, minlength=w1.shape[0]), 0, dtype=torch.int32)
        first, second = (w1, w2) if turned else (w1.transpose(-2, -1), w2.transpose(-2, -1))
        h = gate(torch._grouped_mm(x[order // top_k], first, offs=offs))
        y = torch._grouped_mm(h, second, offs=offs) * w.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return y[back].view(x.shape[0], top_k, -1).sum(1).to(x.dtype)

    return run


def batched(gate: Body) -> Body:
    def run(x: Tensor, ids: Tensor, w: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        rows = x[:, None].expand(-1, ids.shape[1], -1).reshape(-1, x.shape[1])
        h = gate(torch.bmm(w1[flat], rows.unsqueeze(-1)).squeeze(-1))
        y = torch.bmm(w2[flat], h.unsqueeze(-1)).squeeze(-1).view(*ids.shape, -1)
        return (y * w.unsqueeze(-1)).sum(dim=1)

    return run


def recognized(function: Body, args: tuple[Any, ...]) -> RecognizedExperts:
    program = RemoveIdentities().run(trace(function, args), Plan.single("cpu")).program
    found = recognize_experts(program, lambda node: ("", ""))
    verify(program, found.program, "recognize experts")
    return found


def operands(made: support.Experts) -> tuple[Tensor, ...]:
    return made.x, made.ids, made.weights, made.w1, made.w2


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("idiom", ["grouped", "grouped-transposed", "batched"])
def test_a_spelling_is_raised_once_and_means_the_same(idiom: str, name: str) -> None:
    gate, body = GATES[name]
    turned = idiom == "grouped-transposed"
    made = support.make(7, 16, 24, 5, 2, gate, transposed=turned)
    made = made if idiom == "batched" else made.to(torch.bfloat16)  # torch's grouped product is in bfloat16 alone
    function = batched(body) if idiom == "batched" else grouped(body, turned)
    found = recognized(function, operands(made))
    (site,) = found.sites
    assert not found.missed
    assert (site.tokens, site.top_k, site.experts, site.hidden, site.inner) == (7, 2, 5, 16, 24)
    assert (site.gate, site.transposed) == (gate, turned)
    graph = found.program.entries[0].graph
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [torch.ops.eff.moe_v1.default], "nothing of the source is left"
    bound = 1e-5 if idiom == "batched" else 1e-2
    assert support.error(graph(*operands(made)), support.oracle(made)) < bound
    again = recognize_experts(found.program, lambda node: ("", ""))
    assert not again.sites
    assert not again.missed


def test_the_dense_spelling_needs_a_top_k() -> None:
    made = support.make(7, 16, 24, 5, 2)

    def dense(ids: Tensor, weights: Tensor, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        h = swiglu(torch.bmm(x.expand(5, -1, -1), w1.transpose(1, 2)))
        share = x.new_zeros(x.shape[0], 5).scatter(1, ids, weights)
        return (torch.bmm(h, w2.transpose(1, 2)) * share.t()[:, :, None]).sum(0)

    def routed(logits: Tensor, *rest: Tensor) -> Tensor:
        weights, ids = torch.topk(logits.softmax(-1), 2)
        return dense(ids, weights, *rest)

    logits, rest = torch.randn(7, 5), (made.x, made.w1, made.w2)
    found = recognized(routed, (logits, *rest))
    (site,) = found.sites
    assert (site.idiom, site.router) == ("dense", "softmax, top 2")
    torch.testing.assert_close(found.program.entries[0].graph(logits, *rest), routed(logits, *rest))
    given = recognized(dense, (made.ids, made.weights, *rest))
    assert [item.refusal.code for item in given.missed] == ["EFF-M102"], "one id may be there twice"


def wrong_order(x: Tensor, ids: Tensor, w: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    flat = ids.reshape(-1)
    known, order = torch.sort(flat)
    offs = torch.cumsum(torch.bincount(known, minlength=w1.shape[0]), 0, dtype=torch.int32)
    h = swiglu(torch._grouped_mm(x[order // 2], w1.transpose(-2, -1), offs=offs))
    y = torch._grouped_mm(h, w2.transpose(-2, -1), offs=offs) * w.reshape(-1)[order].unsqueeze(-1)
    return y[order].view(x.shape[0], 2, -1).sum(1).to(x.dtype)  # the permutation again, not its inverse


def other_groups(x: Tensor, ids: Tensor, w: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    known, order = torch.sort(ids.reshape(-1))
    offs = torch.cumsum(torch.bincount(known, minlength=w1.shape[0]), 0, dtype=torch.int32)
    h = swiglu(torch._grouped_mm(x[order // 2], w1.transpose(-2, -1), offs=offs))
    y = torch._grouped_mm(h, w2.transpose(-2, -1), offs=offs.flip(0)) * w.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return y[back].view(x.shape[0], 2, -1).sum(1).to(x.dtype)


def swapped(h: Tensor) -> Tensor:
    u, g = h.chunk(2, -1)
    return F.silu(g) * u


def weighted_twice(x: Tensor, ids: Tensor, w: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return batched(swiglu)(x, ids, w, w1, w2 * w[0, 0])


def read_twice(x: Tensor, ids: Tensor, w: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    flat = ids.reshape(-1)
    h = swiglu(torch.bmm(w1[flat], x.repeat_interleave(2, 0).unsqueeze(-1)).squeeze(-1))
    y = torch.bmm(w2[flat], h.unsqueeze(-1)).squeeze(-1) * w.reshape(-1, 1)
    return y.view(*ids.shape, -1).sum(1), h


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (wrong_order, "EFF-M102"),
        (other_groups, "EFF-M104"),
        (batched(swapped), "EFF-M103"),
        (batched(lambda h: h.chunk(2, -1)[0].tanh() * h.chunk(2, -1)[1]), "EFF-M103"),
        (read_twice, "EFF-M106"),
        (lambda x, ids, w, w1, w2: torch.bmm(w1[ids.reshape(-1)], x.repeat_interleave(2, 0)[:, :, None]), "EFF-M101"),
    ],
    ids=["order", "groups", "halves", "tanh", "read", "no-sum"],
)
def test_a_near_miss_stays_and_says_why(function: Body, code: str) -> None:
    made = support.make(7, 16, 24, 5, 2)
    made = made.to(torch.bfloat16) if function in (wrong_order, other_groups) else made
    found = recognized(function, operands(made))
    assert not found.sites
    assert [item.refusal.code for item in found.missed] == [code]
    expected = function(*operands(made))
    torch.testing.assert_close(found.program.entries[0].graph(*operands(made)), expected)


def test_computed_weights_are_operands_like_others() -> None:
    made = support.make(7, 16, 24, 5, 2)
    found = recognized(weighted_twice, operands(made))
    assert len(found.sites) == 1
    torch.testing.assert_close(found.program.entries[0].graph(*operands(made)), weighted_twice(*operands(made)))


def test_a_write_to_the_tokens_meanwhile_keeps_the_source() -> None:
    def written(x: Tensor, ids: Tensor, w: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        h = swiglu(torch.bmm(w1[flat], x.repeat_interleave(2, 0).unsqueeze(-1)).squeeze(-1))
        x.mul_(2)
        y = torch.bmm(w2[flat], h.unsqueeze(-1)).squeeze(-1) * w.reshape(-1, 1)
        return y.view(*ids.shape, -1).sum(1)

    found = recognized(written, operands(support.make(7, 16, 24, 5, 2)))
    assert [item.refusal.code for item in found.missed] == ["EFF-M106"]
