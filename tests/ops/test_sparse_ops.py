"""Check what the sparse attention ops mean: against SDPA and FlexAttention, and by the contracts that they share."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from effcompile import ops
from effcompile.ops import block_scores, block_sparse, column_scores, flash, int8_attention, paged_decode
from tests.support.attention import draw

HALF = settings(max_examples=settings.default.max_examples // 2)


def qkv(rows: int = 5, keys: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k, v of two sequences with four query heads and two key/value heads."""
    return draw((2, 4, rows, 8), dtype), draw((2, 2, keys, 8), dtype, 1), draw((2, 2, keys, 6), dtype, 2)


def every_block(rows: int, keys: int, q_block: int, kv_block: int) -> tuple[Tensor, Tensor]:
    """Return lists of all blocks."""
    return block_sparse.lists(torch.ones(1, 1, -(-rows // q_block), -(-keys // kv_block), dtype=torch.bool))


def cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return calls of every op, by name."""
    ops.register()
    eff = torch.ops.eff
    operands = tuple(x.float() for x in qkv(20, 40))
    edges = (torch.tensor([0, 3], dtype=torch.int32), torch.tensor([40, 25], dtype=torch.int32))
    lists = every_block(20, 40, 16, 16)
    lengths, pages = torch.tensor([30, 9], dtype=torch.int32), torch.tensor([[[1, 0], [0, 1]]] * 2, dtype=torch.int32)
    cache = tuple(draw((2, 2, 3, 16, width), seed=3) for width in (8, 6))
    limits = (torch.zeros(1, 20).int(), torch.full((2, 20), 30).int(), torch.ones(1, 40).to(torch.uint8))
    few = operands[0][:, :, :2].contiguous()
    return {
        "flash": (eff.flash_v1.default, (*operands, None, None, -1, -1, 20, 0.3, 0.0)),
        "flash banded": (eff.flash_v1.default, (*operands, *edges, 3, 0, 20, 0.3, 5.0)),
        "block sparse": (
            eff.block_sparse_v1.default,
            (*operands, *lists, *(None,) * 9, -1, 0, 20, 16, 16, 0.3, 0.0),
        ),
        "block sparse epilogue": (
            eff.block_sparse_v1.default,
            (
                *operands,
                *lists,
                *lists,
                *edges,
                *limits,
                torch.rand(2, 4, 20),
                draw((2, 4, 20, 6)),
                -1,
                0,
                20,
                16,
                16,
                0.3,
                0.0,
            ),
        ),
        "paged decode": (
            eff.paged_decode_v1.default,
            (few, *cache, lengths, None, pages, torch.ones(2, 2).int(), 0.3, 0.0, 2),
        ),
        "paged decode pool": (
            eff.paged_decode_v1.default,
            (few, *(x[:1] for x in cache), lengths, pages[:, 0].contiguous(), None, None, 0.3, 4.0, 0),
        ),
        "pooled scores": (eff.pooled_scores_v1.default, (*operands[:2], *edges, -1, 0, 20, 16, 16, 0.3)),
        "antidiagonal mass": (eff.antidiagonal_mass_v1.default, (*operands[:2], None, None, 0, 20, 16, 16, 4, 0.3)),
        "column sums": (
            eff.column_sums_v1.default,
            (*operands[:2], torch.zeros(2, 4, 20), *edges, -1, 0, 20, 0.3, 0.0),
        ),
        "probe scores": (eff.probe_scores_v1.default, (*operands[:2], None, None, -1, 0, 20, 0.3, 0.0)),
        "int8": (eff.int8_attention_v1.default, (*operands, *edges, -1, 0, 20, 0.3)),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_opcheck(name: str) -> None:
    op, args = cases()[name]
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", list(cases()))
def test_no_op_writes_or_aliases(name: str) -> None:
    op, args = cases()[name]
    assert not op._schema.is_mutable
    results = op(*args)
    given = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)]
    for result in results if isinstance(results, tuple) else (results,):
        assert all(result.untyped_storage()._cdata != x.untyped_storage()._cdata for x in given)


@pytest.mark.parametrize("name", list(cases()))
def test_compiled_is_eager_without_recompiling(name: str) -> None:
    """Values may change from step to step, and nothing is compiled again."""
    op, args = cases()[name]
    count = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        count.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *a: op(*a), backend=backend, fullgraph=True)
    for step in range(3):
        moved = [x + step if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        expected, got = op(*moved), compiled(*moved)
        pairs = zip(expected, got) if isinstance(expected, tuple) else [(expected, got)]
        assert all(torch.equal(one, two) for one, two in pairs)
    assert len(count) == 1


@pytest.mark.parametrize("causal", [False, True])
def test_flash_is_sdpa(causal: bool) -> None:
    q, k, v = qkv(7, 7)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)
    out, lse = flash.flash(q, k, v, None, None, -1, 0 if causal else -1, 0, 0.3, 0.0)
    torch.testing.assert_close(out, expected)
    scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3)) * 0.3
    if causal:
        scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1))


def test_band_is_the_predicate_written_out() -> None:
    begin, end = torch.tensor([0, 4]), torch.tensor([6, 9])
    kept = flash.band(2, 5, 9, begin, end, 3, 1, 4, torch.device("cpu"))
    for b in range(2):
        for i in range(5):
            for j in range(9):
                want = i + 4 - 3 <= j <= i + 4 + 1 and begin[b] <= j < end[b]
                assert bool(kept[b, 0, i, j]) == want


@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from((4, 8)), st.sampled_from((4, 16)), st.integers(0, 99))
@HALF
def test_block_sparse_is_flex_attention(rows: int, keys: int, q_block: int, kv_block: int, seed: int) -> None:
    q, k, v = (
        draw((2, 4, rows, 8), torch.float64),
        draw((2, 2, keys, 8), torch.float64, 1),
        draw((2, 2, keys, 8), torch.float64, 2),
    )
    shape = (2, 4, -(-rows // q_block), -(-keys // kv_block))
    generator = torch.Generator().manual_seed(seed)
    partial = torch.rand(shape, generator=generator) < 0.5
    full = (torch.rand(shape, generator=generator) < 0.3) & ~partial
    lists = (*block_sparse.lists(partial), *block_sparse.lists(full))
    offset = keys - rows

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = (j <= i + offset) & partial[b, h, i // q_block, j // kv_block]
        return inside | full[b, h, i // q_block, j // kv_block]

    mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=(q_block, kv_block), mask_mod=keep, seq_lengths=(rows, keys))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow when it is not compiled
        expected, lse = flex_attention(q, k, v, block_mask=mask, scale=0.3, enable_gqa=True, return_lse=True)
    out, own = block_sparse.block_sparse(q, k, v, *lists, *(None,) * 7, -1, 0, offset, q_block, kv_block, 0.3, 0.0)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(own, lse)


@given(st.integers(1, 20), st.integers(0, 99))
@HALF
def test_what_is_dropped_is_bounded_by_its_mass(keys: int, seed: int) -> None:
    """||O - O_sub|| <= (1 - c) * diameter of V, with c = exp(LSE_sub - LSE)."""
    q, k, v = (
        draw((1, 2, 6, 8), torch.float64, seed),
        draw((1, 2, keys, 8), torch.float64, seed + 1),
        draw((1, 2, keys, 8), torch.float64),
    )
    chosen = torch.rand(1, 2, 3, -(-keys // 4), generator=torch.Generator().manual_seed(seed)) < 0.5
    chosen[..., 0] = True
    out, lse = flash.flash(q, k, v, None, None, -1, -1, 0, 0.5, 0.0)
    lists = block_sparse.lists(chosen)
    sub, own = block_sparse.block_sparse(q, k, v, *lists, *(None,) * 9, -1, -1, 0, 2, 4, 0.5, 0.0)
    share = torch.exp(own - lse)
    diameter = torch.cdist(v, v).amax((2, 3))
    assert (share <= 1 + 1e-12).all()
    assert ((out - sub).norm(dim=-1) <= (1 - share) * diameter[..., None] + 1e-12).all()


def test_merging_disjoint_keys_is_whole() -> None:
    q, k, v = qkv(5, 9)
    parts = [
        flash.flash(q, k[:, :, s], v[:, :, s], None, None, -1, -1, 0, 0.3, 0.0) for s in (slice(0, 4), slice(4, 9))
    ]
    for one, two in zip(flash.merge(*parts), flash.flash(q, k, v, None, None, -1, -1, 0, 0.3, 0.0)):
        torch.testing.assert_close(one, two)
    none = (torch.zeros_like(parts[0][0]), torch.full_like(parts[0][1], -math.inf))
    assert all(torch.equal(one, two) for one, two in zip(flash.merge(none, none), none))
    for one, two in zip(flash.merge(parts[0], none), parts[0]):
        torch.testing.assert_close(one, two)


@given(st.integers(1, 60), st.integers(1, 3), st.sampled_from((4, 16)), st.integers(0, 99))
@HALF
def test_paged_decode_is_attention_over_the_kept_tokens(length: int, rows: int, size: int, seed: int) -> None:
    """A shuffled pool, read through a table and a list of pages, is plain attention over the tokens of these pages."""
    rows = min(rows, length)
    count = -(-length // size)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        draw((1, 4, rows, 8), torch.float64),
        draw((1, 2, count * size, 8), torch.float64, 1),
        draw((1, 2, count * size, 6), torch.float64, 2),
    )
    place = torch.randperm(count + 2, generator=generator)[:count]
    pools = []
    for x in (k, v):
        pool = torch.full((1, 2, count + 2, size, x.shape[3]), math.nan, dtype=torch.float64)
        pool[:, :, place] = x.unflatten(2, (count, size))
        pools.append(pool)
    kept = torch.randint(1, count + 1, (1, 2), generator=generator)
    pages = torch.stack([torch.randperm(count, generator=generator) for _ in range(2)])[None]
    out, lse = paged_decode.paged_decode(
        q, *pools, torch.tensor([length]), place[None].int(), pages.int(), kept.int(), 0.3, 0.0, 0
    )
    for head in range(4):
        chosen = pages[0, head // 2, : int(kept[0, head // 2])]
        tokens = (chosen[:, None] * size + torch.arange(size)).flatten()
        mask = (tokens < length) & (tokens <= torch.arange(length - rows, length)[:, None])
        scores = (q[0, head] @ k[0, head // 2, tokens].T * 0.3).masked_fill(~mask, -math.inf)
        there = mask.any(-1)
        expected = torch.softmax(scores[there], -1) @ v[0, head // 2, tokens]
        torch.testing.assert_close(out[0, head, there], expected)
        torch.testing.assert_close(lse[0, head], torch.logsumexp(scores, -1))
        assert torch.equal(out[0, head, ~there], torch.zeros_like(out[0, head, ~there]))


def test_pooled_scores_are_the_mean_of_the_scores() -> None:
    """mean_i mean_j q_i . k_j = mean(q) . mean(k), over the rows that exist and the keys in the range."""
    q, k, _ = qkv(10, 13)
    begin, end = torch.tensor([0, 5]), torch.tensor([13, 11])
    got = block_scores.pooled_scores(q, k, begin, end, -1, -1, 0, 4, 4, 0.3)
    scores = flash.scores(q, k, 0.3)
    for b in range(2):
        for m in range(3):
            for n in range(4):
                low, high = max(4 * n, int(begin[b])), min(4 * n + 4, int(end[b]))
                part = scores[b, :, 4 * m : 4 * m + 4, low:high]
                expected = part.mean((1, 2)) if high > low else torch.full((4,), -math.inf, dtype=torch.float64)
                torch.testing.assert_close(got[b, :, m, n], expected)


def test_blocks_that_the_band_drops_have_no_score() -> None:
    q, k, _ = qkv(9, 9)
    got = block_scores.pooled_scores(q, k, None, None, 2, 0, 0, 3, 3, 0.3)[0, 0]
    assert (got != -math.inf).tolist() == [[True, False, False], [True, True, False], [False, True, True]]


def test_antidiagonal_mass_written_out() -> None:
    q, k, _ = qkv(11, 14)
    stride, offset = 2, 4
    got = block_scores.antidiagonal_mass(q, k, None, None, 0, offset, 4, 4, stride, 0.3)
    queries, keys = F.pad(q, (0, 0, 0, 1)), k.repeat_interleave(2, 1)
    groups, key_groups = 6, 7
    scores = torch.full((2, 4, groups, key_groups), -math.inf, dtype=torch.float64)
    for n in range(groups):
        for m in range(key_groups):
            if m * stride <= n * stride + stride - 1 + offset:
                pairs = [(queries[:, :, n * 2 + 1 - r] * keys[:, :, m * 2 + r]).sum(-1) for r in range(stride)]
                scores[:, :, n, m] = 0.3 * sum(pairs) / stride
    weights = torch.softmax(scores, -1)
    for a in range(3):
        for b in range(4):
            expected = weights[:, :, 2 * a : 2 * a + 2, 2 * b : 2 * b + 2].sum(3).mean(2)
            torch.testing.assert_close(got[:, :, a, b], expected)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 4, 3, dtype=torch.float64))


def test_column_sums_are_sums_of_probabilities() -> None:
    q, k, v = qkv(9, 12)
    begin, end = torch.tensor([0, 4]), torch.tensor([12, 9])
    lse = flash.flash(q, k, v, begin, end, -1, 0, 3, 0.3, 2.0)[1]
    got = column_scores.column_sums(q, k, lse, begin, end, -1, 0, 3, 0.3, 2.0)
    kept = flash.band(2, 9, 12, begin, end, -1, 0, 3, q.device)
    scores = flash.scores(q, k, 0.3, 2.0).masked_fill(~kept, -math.inf)
    torch.testing.assert_close(got, torch.softmax(scores, -1).nan_to_num(0.0).sum(2))
    rows = kept.any(-1).sum(-1).double().expand(2, 4)
    torch.testing.assert_close(got.sum(-1), rows)
    probed, own = column_scores.probe_scores(q, k, begin, end, -1, 0, 3, 0.3, 2.0)
    torch.testing.assert_close(probed, got)
    torch.testing.assert_close(own, lse)


@given(st.integers(1, 200), st.sampled_from((64, 128)), st.integers(0, 99))
@HALF
def test_rounding_is_within_half_a_step(rows: int, block: int, seed: int) -> None:
    x = draw((1, 2, rows, 8), torch.float64, seed)
    whole, scale = int8_attention.quantized(x, block)
    assert whole.abs().max() <= 127
    assert torch.equal(whole, whole.round())
    assert ((whole * scale - x).abs() <= scale / 2 + 1e-12).all()
    assert torch.equal(
        int8_attention.quantized(torch.zeros_like(x), block)[1], torch.ones(1, 2, rows, 1, dtype=torch.float64)
    )
