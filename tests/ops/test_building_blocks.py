"""Compare the building blocks of selectors with what they stand for, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile.core.expr import BOOL, TRUE, apply, const, load
from effcompile.core.expr_eval import evaluate, to_json
from effcompile.core.mask import CAUSAL, B, K, Q
from effcompile.ops.attention import grid as grid_axes
from effcompile.ops.block_choice import row_budgets, top_cdf, top_k
from effcompile.ops.block_grid import BlockGrid, block_mass, means
from effcompile.ops.column_sums import column_sums
from effcompile.ops.page_stats import page_bounds, page_stats
from effcompile.ops.ragged import gather_plan, gather_rows, scatter_rows

quick = settings(max_examples=60, deadline=None)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- column sums ---


@quick
@given(st.integers(1, 60), st.integers(1, 60), st.booleans(), st.booleans(), st.integers(0, 99))
def test_column_sums_are_those_of_the_probabilities(
    rows: int, keys: int, given_lse: bool, all_rows: bool, seed: int
) -> None:
    q, k = drawn(seed, 2, 4, rows, 8), drawn(seed + 1, 2, 2, keys, 8)
    real = torch.rand(2, keys, generator=torch.Generator().manual_seed(seed)) < 0.7
    keep = apply("and", CAUSAL.keep, load(0, (B, K), BOOL))
    places = torch.arange(rows)
    kept = (torch.arange(keys)[None] <= places[:, None])[None, None] & real[:, None, None]
    scores = (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.3).masked_fill(~kept, -math.inf)
    chosen = places if all_rows else places[:: 1 + seed % 3]
    expected = scores.softmax(-1).nan_to_num()[:, :, chosen].sum(2)
    lse = scores.logsumexp(-1).float() if given_lse else None
    found = column_sums(q, k, lse, chosen, [real], [], to_json(keep), 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    alive = kept.any(-1).expand(2, 4, rows)[:, :, chosen].sum(-1)
    torch.testing.assert_close(found.sum(-1), alive.float(), rtol=1e-4, atol=1e-4)


# --- choice of blocks ---


def maps(seed: int, rows: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, allowed blocks and forced ones `[2, 3, rows, keys]`; some rows allow nothing."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 3, rows, keys, generator=draw)
    if seed % 3 == 0:
        scores = (scores * 4).round() / 4  # ties
    some = torch.rand(2, 3, rows, keys, generator=draw) < 0.7
    some[:, :, rows // 2] = False
    return scores, some, some & (torch.rand(2, 3, rows, keys, generator=draw) < 0.2)


@quick
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 999))
def test_top_k_keeps_the_best(rows: int, keys: int, seed: int) -> None:
    scores, some, _ = maps(seed, rows, keys)
    budget = torch.randint(0, keys + 2, (2, 3, rows), generator=torch.Generator().manual_seed(seed))
    chosen = top_k(scores, budget, some)
    assert not (chosen & ~some).any()
    assert torch.equal(chosen.sum(-1), torch.minimum(budget, some.sum(-1)))
    worst = scores.masked_fill(~chosen, math.inf).amin(-1)
    best = scores.masked_fill(chosen | ~some, -math.inf).amax(-1)
    assert (worst >= best).all()
    assert torch.equal(chosen, top_k(scores, budget, some))


@quick
@given(st.integers(1, 9), st.integers(1, 12), st.floats(0.05, 0.999), st.integers(0, 999))
def test_top_cdf_keeps_enough_and_no_more(rows: int, keys: int, share: float, seed: int) -> None:
    scores, some, forced = maps(seed, rows, keys)
    mass = scores.double() / scores.double().masked_fill(~some, 0).sum(-1, keepdim=True).clamp(min=1e-9)
    chosen = top_cdf(mass, share, some, forced)
    assert not (chosen & ~some).any()
    assert not (forced & ~chosen).any()
    held = mass.masked_fill(~chosen, 0).sum(-1)
    enough = share * mass.masked_fill(~some, 0).sum(-1)
    assert (held >= enough - 1e-6).all()
    # Without the least of the blocks that were not forced, and those that tie with it, the share is missed.
    free = mass.masked_fill(~(chosen & ~forced), math.inf)
    least = free.amin(-1, keepdim=True)
    without = held - free.masked_fill(free > least + 1e-6, 0).masked_fill(~(chosen & ~forced), 0).sum(-1)
    assert (without[(chosen & ~forced).any(-1)] < enough[(chosen & ~forced).any(-1)] + 1e-6).all()


def test_top_cdf_of_everything() -> None:
    scores, some, forced = maps(1, 6, 9)
    scores[..., 3] = 0
    assert torch.equal(top_cdf(scores, 1.0, some, forced), (some & (scores > 0)) | forced)


@quick
@given(st.integers(1, 80), st.floats(0.0, 1.2))
def test_budgets_add_up(blocks: int, share: float) -> None:
    free = torch.arange(blocks)
    total = share * float(free.sum())
    budget = row_budgets(free, torch.tensor(total))
    assert (budget >= 0).all()
    assert (budget <= free).all()
    assert abs(int(budget.sum()) - min(total, float(free.sum()))) <= blocks / 2 + 1
    cut = budget < free
    assert not cut.any() or int(budget[cut].max()) - int(budget[cut].min()) <= 1
    assert torch.equal(row_budgets(free, torch.tensor(math.inf)), free)


# --- the grid ---


@quick
@given(
    st.sampled_from(["causal", "offset", "padding", "window", "full", "dilated"]),
    st.integers(1, 40),
    st.integers(0, 20),
    st.sampled_from([(4, 4), (8, 4), (4, 8)]),
    st.integers(0, 99),
)
def test_the_past_holds_nothing_that_is_hidden(
    kind: str, rows: int, more: int, blocks: tuple[int, int], seed: int
) -> None:
    """No query of a block is before a key of the block's past; what is allowed and not past is forced; no row loses its keys."""
    keys = rows + more
    real = torch.rand(2, keys, generator=torch.Generator().manual_seed(seed)) < 0.7
    order = apply("le", K, apply("add", Q, const(more)))
    keep = {
        "causal": CAUSAL.keep,
        "offset": order,
        "padding": apply("and", order, load(0, (B, K), BOOL)),
        "window": apply("and", order, apply("le", apply("add", Q, const(more - 9)), K)),
        "full": TRUE,
        "dilated": apply("eq", apply("mod", apply("sub", Q, K), const(3)), const(0)),
    }[kind]
    grid = BlockGrid((2, 3, rows, keys), blocks, to_json(keep), [real], [], torch.device("cpu"))
    kept = evaluate(keep, grid_axes(2, 3, rows, keys, torch.device("cpu")), [real], []).expand(2, 3, rows, keys)
    past, forced = (x.expand(2, 3, -1, -1) for x in (grid.past(), grid.forced()))
    wide = past.repeat_interleave(blocks[0], 2)[:, :, :rows].repeat_interleave(blocks[1], 3)[..., :keys]
    if kind not in ("full", "dilated"):
        places = torch.arange(keys) <= torch.arange(rows)[:, None] + (0 if kind == "causal" else more)
        assert not (wide & ~places).any()
    assert not (grid.some & ~past & ~forced).any()
    assert not (forced & ~grid.some).any()
    held = forced.repeat_interleave(blocks[0], 2)[:, :, :rows].repeat_interleave(blocks[1], 3)[..., :keys]
    own = torch.arange(rows)[:, None] + (more if kind not in ("causal", "full", "dilated") else 0) == torch.arange(keys)
    assert not (kept & own & ~held).any(), "a query loses its own key"
    fine = grid.past((2, 2)).expand(2, 3, -1, -1)
    fine = fine.repeat_interleave(2, 2)[:, :, :rows].repeat_interleave(2, 3)[..., :keys]
    assert not (kept & wide & ~fine).any(), "units see less than blocks"
    if kind not in ("full", "dilated"):
        assert not (fine & ~places).any()


@quick
@given(st.integers(1, 40), st.sampled_from([1, 4, 8]), st.booleans(), st.integers(0, 99))
def test_means(length: int, unit: int, holes: bool, seed: int) -> None:
    x = drawn(seed, 2, 3, length, 5)
    real = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.6 if holes else None
    found = means(x, unit, real)
    for part in range(found.shape[2]):
        for b in range(2):
            piece = x[b, :, part * unit : (part + 1) * unit]
            if real is not None:
                piece = piece[:, real[b, part * unit : (part + 1) * unit]]
            expected = piece.mean(1) if piece.shape[1] else torch.zeros(3, 5)
            torch.testing.assert_close(found[b, :, part], expected)


def test_the_mass_of_blocks_adds_up() -> None:
    """On units of one position it is the attention over the past, summed over keys and averaged over queries, in pieces or not."""
    q, k = drawn(0, 2, 4, 21, 8), drawn(1, 2, 2, 30, 8)
    keep = apply("le", K, apply("add", Q, const(9)))
    grid = BlockGrid((2, 4, 21, 30), (4, 8), to_json(keep), [], [], torch.device("cpu"))
    allowed = grid.past((1, 1))
    scores = (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.3).masked_fill(~allowed, -math.inf)
    probs = scores.softmax(-1).nan_to_num()
    expected = F.pad(probs, (0, 2)).unflatten(3, (4, 8)).sum(4)
    expected = torch.stack([expected[:, :, at : at + 4].mean(2) for at in range(0, 21, 4)], 2)
    torch.testing.assert_close(block_mass(grid, q, k, (1, 1), 0.3).double(), expected, rtol=1e-5, atol=1e-6)


# --- pages ---


@quick
@given(st.integers(0, 70), st.integers(1, 20), st.lists(st.integers(1, 25), max_size=4), st.integers(0, 99))
def test_appending_is_summarizing_anew(length: int, page: int, steps: list[int], seed: int) -> None:
    keys = drawn(seed, 2, 3, length + sum(steps), 5)
    stats, done = page_stats(keys[:, :, :length], page), length
    for step in steps:
        stats = stats.append(keys[:, :, done : done + step])
        done += step
    for cut in (done, max(0, done - 7), done // 2):
        found, expected = stats.truncate(cut, keys), page_stats(keys[:, :, :cut], page)
        assert found.length == cut
        torch.testing.assert_close(found.sums, expected.sums)
        assert torch.equal(found.least, expected.least)
        assert torch.equal(found.most, expected.most)


@pytest.mark.parametrize("length", [1, 15, 16, 40])
def test_summaries_stand_for_the_scores_of_their_pages(length: int) -> None:
    """The mean gives the mean of the scores exactly; the bounds are above every score, for adversarial signs as well."""
    q, keys = drawn(0, 2, 6, 3, 8).double(), drawn(1, 2, 2, length, 8).double()
    for signs in (torch.ones(8), torch.tensor([1.0, -1.0] * 4), -torch.ones(8)):
        query = q * signs
        stats = page_stats(keys, 16)
        scores = query @ keys.repeat_interleave(3, 1).transpose(-1, -2)
        pages = F.pad(scores, (0, -length % 16), value=math.nan).unflatten(-1, (-1, 16))
        mean = query @ stats.mean.repeat_interleave(3, 1).transpose(-1, -2)
        torch.testing.assert_close(mean, pages.nanmean(-1))
        assert (page_bounds(query, stats) >= pages.nan_to_num(-math.inf).amax(-1) - 1e-9).all()


def test_summaries_of_some_keys_are_those_of_their_pages() -> None:
    keys, real = drawn(2, 2, 2, 40, 8), torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    real[1, 16:32] = False
    found = page_stats(keys, 16, real)
    for b in range(2):
        for page in range(3):
            mine = keys[b, :, page * 16 : page * 16 + 16][:, real[b, page * 16 : page * 16 + 16]]
            some = mine.shape[1] > 0
            zero = torch.zeros(2, 8)
            torch.testing.assert_close(found.least[b, :, page], mine.amin(1) if some else zero)
            torch.testing.assert_close(found.most[b, :, page], mine.amax(1) if some else zero)
            torch.testing.assert_close(found.sums[b, :, page], mine.sum(1))


# --- ragged rows ---


@quick
@given(st.integers(1, 40), st.sampled_from([1, 4, 16]), st.integers(0, 999))
def test_rows_return_to_their_places(length: int, multiple: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(3, length, generator=draw) < 0.5
    if seed % 4 == 0:
        kept[0] = False
    x = drawn(seed, 3, 2, length, 4)
    index, used = gather_plan(kept, multiple)
    assert torch.equal(used.sum(-1), kept.sum(-1))
    assert index.shape[1] in (length, -(-int(kept.sum(-1).max()) // multiple) * multiple)
    for row in range(3):
        assert torch.equal(index[row][used[row]], kept[row].nonzero().squeeze(1)), "order is kept"
    back = scatter_rows(gather_rows(x, index), index, used, length)
    assert torch.equal(back, x * kept[:, None, :, None])


def test_full_predicates_need_no_operands() -> None:
    q, k = drawn(0, 1, 2, 5, 4), drawn(1, 1, 1, 7, 4)
    found = column_sums(q, k, None, torch.arange(5), [], [], to_json(TRUE), 0.5)
    expected = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.5).softmax(-1).sum(2)
    torch.testing.assert_close(found, expected)
