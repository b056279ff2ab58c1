"""Snap tokens to codes: the kernel and the streaming composition against all scores at once, the pass, near misses, the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import effcompile as eff
from bench.child import peak_of, start_peak
from effcompile import ops
from effcompile.core.errors import EffError
from effcompile.core.plan import Plan
from effcompile.models.codebook import Codebook, CodebookConfig, Snap
from effcompile.ops import codebook as op
from effcompile.passes.canonicalize import RemoveIdentities
from effcompile.passes.fuse_codebook import FuseCodebook
from tests.support.check import CPU, text, trace

ops.register()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scale_of(codes: Tensor) -> Tensor:
    return 1 / codes.norm(dim=-1)


@pytest.mark.parametrize(
    ("tokens", "groups", "codes", "width", "top_k"),
    [(1, 1, 1, 1, 1), (5, 2, 300, 16, 8), (70, 3, 2100, 24, 4), (33, 1, 255, 7, 255), (3, 4, 1025, 64, 1)],
)
def test_both_ways_are_all_scores_at_once(tokens: int, groups: int, codes: int, width: int, top_k: int) -> None:
    """Float64 streams in pieces; float32 is the C++ kernel. Scores are distinct, so that both choose the same codes."""
    x, book = drawn(tokens, groups, width), drawn(groups, codes, width, seed=1)
    exact = op.written(x, book, top_k)
    assert torch.allclose(op.streamed(x, book, scale_of(book), top_k), exact, atol=1e-12)
    assert torch.allclose(torch.ops.eff.codebook_v1(x, book, top_k), exact, atol=1e-12)
    found = torch.ops.eff.codebook_v1(x.float(), book.float(), top_k)
    assert found.dtype == torch.float32
    assert float((found.double() - exact).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_ranks_in_float32(dtype: torch.dtype) -> None:
    x, book = drawn(40, 2, 32).to(dtype), drawn(2, 600, 32, seed=1).to(dtype)
    exact = op.written(x.double(), book.double(), 4)
    found = torch.ops.eff.codebook_v1(x, book, 4)
    assert float((found.double() - exact).abs().max()) < 2e-2 * float(exact.abs().max())


def test_any_layout_and_any_leading_dimensions() -> None:
    x, book = drawn(2, 3, 9, 16).transpose(1, 2).float(), drawn(16, 3, 50).float().transpose(0, 1).transpose(1, 2)
    assert not x.is_contiguous()
    assert not book.is_contiguous()
    torch.testing.assert_close(torch.ops.eff.codebook_v1(x, book, 3), op.written(x, book, 3), rtol=1e-5, atol=1e-6)


def test_a_code_finds_itself_and_all_codes_give_their_mean() -> None:
    book = torch.nn.functional.normalize(drawn(2, 500, 16, seed=1), dim=-1).float()
    assert torch.equal(torch.ops.eff.codebook_v1(book.transpose(0, 1), book, 1), book.transpose(0, 1))
    mean = torch.ops.eff.codebook_v1(drawn(6, 2, 16).float(), book, 500)
    torch.testing.assert_close(mean, book.mean(1).expand(6, -1, -1), rtol=1e-5, atol=1e-6)
    x = drawn(6, 2, 16).float()
    assert torch.equal(torch.ops.eff.codebook_v1(x, book, 5), torch.ops.eff.codebook_v1(x * 8, book, 5))


def test_of_equal_codes_the_first_is_taken() -> None:
    """A book of one code in powers of two: every score is the same number, bit by bit."""
    book = torch.ones(1, 600, 8) * 2.0 ** (torch.arange(600) % 20)[None, :, None]
    found = torch.ops.eff.codebook_v1(torch.ones(2, 1, 8), book, 3)
    assert torch.equal(found, torch.full((2, 1, 8), (1 + 2 + 4) / 3))


def test_scores_are_never_in_memory() -> None:
    """All scores are 82 MB here; the op holds the packed book and a strip of scores."""
    x, book = drawn(1024, 2, 16).float(), drawn(2, 10_000, 16, seed=1).float()
    torch.ops.eff.codebook_v1(x[:8], book, 4)
    for run, least, most in ((op.written, 80e6, 1e9), (torch.ops.eff.codebook_v1, 0, 8e6)):
        before, counts = start_peak("cpu")
        if not counts:
            pytest.skip("the peak of a process cannot be reset here")
        run(x, book, 4)
        assert least <= peak_of("cpu") - before < most


def test_operands_that_do_not_fit_are_named() -> None:
    for x, codes, top_k in (((2, 3, 8), (2, 9, 8), 1), ((2, 3, 8), (3, 9, 8), 10), ((2, 3, 8), (3, 9, 8), 0)):
        with pytest.raises(EffError, match="EFF-R120"):
            torch.ops.eff.codebook_v1(torch.zeros(x), torch.zeros(codes), top_k)


def fused(run: Callable[..., Tensor], args: list[Tensor]) -> tuple[torch.fx.GraphModule, int]:
    """Run the pass twice; return its graph, and how many snaps it found."""
    plan = Plan.single(str(CPU))
    program = RemoveIdentities().run(trace(run, args), plan).program
    before = text(program)
    result = FuseCodebook().run(program, plan)
    assert text(program) == before, "the pass changed the program that it was given"
    assert not FuseCodebook().run(result.program, plan).changed
    graph = result.program.entries[0].graph
    count = sum(node.target is torch.ops.eff.codebook_v1.default for node in graph.graph.nodes)
    assert result.changed == (count > 0)
    return graph, count


X, BOOK = drawn(2, 5, 3, 8), drawn(3, 40, 8, seed=1)


def test_a_snap_is_fused() -> None:
    graph, count = fused(lambda x, c: op.written(x, c, 4), [X, BOOK])
    assert count == 1
    assert not any("topk" in str(node.target) for node in graph.graph.nodes)
    assert torch.allclose(graph(X, BOOK), op.written(X, BOOK, 4), atol=1e-12)


def _scores(x: Tensor, c: Tensor) -> Tensor:
    return torch.einsum("...gd,gnd->...gn", x, c) / c.norm(dim=-1)


def _read(x: Tensor, c: Tensor) -> Tensor:
    values, ids = _scores(x, c).topk(4, dim=-1)
    return c[torch.arange(c.shape[0])[:, None], ids].mean(-2) + values.sum(-1, keepdim=True)


def _snap(x: Tensor, c: Tensor, *, other: Tensor | None = None, divide: bool = True, largest: bool = True) -> Tensor:
    scores = torch.einsum("...gd,gnd->...gn", x, c)
    scores = scores / c.norm(dim=-1) if divide else scores
    ids = scores.topk(4, dim=-1, largest=largest).indices
    group = torch.arange(c.shape[0])[:, None]
    return (c if other is None else other)[group, ids].mean(-2)


NEAR_MISSES: dict[str, Callable[..., Tensor]] = {
    "plain inner products": lambda x, c: _snap(x, c, divide=False),
    "the least": lambda x, c: _snap(x, c, largest=False),
    "codes of another book": lambda x, c: _snap(x, c, other=c + 1),
    "a sum": lambda x, c: c[torch.arange(3)[:, None], _scores(x, c).topk(4, dim=-1).indices].sum(-2),
    "scores are read": _read,
    "a write": lambda x, c: op.written(x, c, 4) + x.clone().add_(1),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str) -> None:
    assert fused(NEAR_MISSES[name], [X, BOOK])[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_many_scores_are_one_number_the_source_chooses(dtype: torch.dtype) -> None:
    assert fused(lambda x, c: op.written(x, c, 4), [X.to(dtype), BOOK.to(dtype)])[1] == 0


def test_a_compiled_model_reads_each_book_once() -> None:
    torch.manual_seed(0)
    model = Codebook(CodebookConfig.tiny()).eval()
    fast = torch.compile(model, backend="eff", dynamic=True, options={"emit": "interpreter", "strict": True})
    ids = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for given in (ids, ids[:2, :5].contiguous()):
            torch.testing.assert_close(fast(given), model(given), rtol=1e-4, atol=1e-4)
    (graph,) = eff.report()["graphs"]
    assert "fuse-codebook: 2 codebooks read once" in graph["notes"]


def test_in_training_gradients_go_straight_through() -> None:
    torch.manual_seed(0)
    snap = Snap(2, 4, 20, 3).train()
    x = torch.randn(1, 5, 2, 4, requires_grad=True)
    weight = torch.randn(1, 5, 2, 4)
    out = snap(x)
    torch.testing.assert_close(out, snap.eval()(x))
    (out * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight)
    assert snap.codes.grad is not None
    assert snap.codes.grad.abs().sum() > 0
    before = snap.train().loss(x)
    before.backward()
    assert before > 0
    torch.testing.assert_close(x.grad, weight)  # the loss reaches the codes alone
