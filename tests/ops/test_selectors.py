"""Compare selectors with their definitions, written out pair by pair in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from effcompile import ops
from effcompile.core.expr import BOOL, apply, const, load
from effcompile.core.expr_eval import to_json
from effcompile.core.mask import B, K, Q
from effcompile.ops.block_grid import BlockGrid
from effcompile.ops.selectors.antidiagonal import antidiagonal_blocks
from effcompile.ops.selectors.pages import pages
from effcompile.ops.selectors.pooled import pooled_blocks
from effcompile.ops.selectors.topk import topk_blocks
from effcompile.ops.selectors.vertical_slash import vertical_slash_blocks

quick = settings(max_examples=25, deadline=None)
few = settings(max_examples=8, deadline=None)
ROWS, KEYS, MORE = 61, 70, 9
KEEP = apply("le", K, apply("add", Q, const(MORE)))
CPU = torch.device("cpu")


def qk(seed: int, rows: int = ROWS, keys: int = KEYS, width: int = 8) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, rows, width, generator=draw), torch.randn(2, 2, keys, width, generator=draw)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)


def grid_of(q: Tensor, k: Tensor, blocks: tuple[int, int], keep: object = KEEP) -> BlockGrid:
    return BlockGrid((*q.shape[:3], k.shape[2]), blocks, to_json(keep), [], [], CPU)  # type: ignore[arg-type]


def blocked(x: Tensor, height: int, width: int) -> Tensor:
    """Return pairs `[..., Q, K]` as `[..., Qb, Kb, height, width]`, NaN past the ends."""
    tail = (0, -x.shape[-1] % width, 0, -x.shape[-2] % height)
    return F.pad(x, tail, value=math.nan).unflatten(-1, (-1, width)).unflatten(-3, (-1, height)).transpose(-2, -3)


@quick
@given(st.floats(0.05, 1.0), st.sampled_from([(8, 8), (16, 8)]), st.integers(0, 99))
def test_top_k_is_by_the_mean_of_the_true_scores(density: float, blocks: tuple[int, int], seed: int) -> None:
    q, k = qk(seed)
    grid = grid_of(q, k, blocks)
    chosen = topk_blocks(q, k, [], [], to_json(KEEP), density, *blocks)
    forced, free = grid.forced(), grid.some & ~grid.forced()
    assert not (chosen & ~grid.some).any()
    assert (chosen | ~forced).all()
    mean = blocked(scores_of(q, k), *blocks).flatten(-2).nanmean(-1)
    mean = mean.unflatten(1, (2, 2)).mean(2).repeat_interleave(2, 1)  # over the heads of a group
    worst = mean.masked_fill(~(chosen & free), math.inf).amin(-1)
    best = mean.masked_fill(chosen | ~free, -math.inf).amax(-1)
    assert (worst >= best - 1e-6).all()
    kept = (grid.weights * chosen).sum((-1, -2)) / grid.weights.sum((-1, -2))
    least = float((grid.weights * forced).sum() / grid.weights.sum())
    slack = chosen.shape[2] / float(grid.weights.sum())
    assert (kept >= max(min(density, 1.0), least) - slack).all() or density >= 1
    assert (kept <= max(density, least) + slack).all()


@quick
@given(st.floats(0.1, 0.99), st.sampled_from(["antidiagonal", "pooled"]), st.integers(0, 99))
def test_units_of_one_position_see_the_exact_mass(share: float, kind: str, seed: int) -> None:
    """With a stride of 1, or blocks of one query and one key, the estimate is the attention itself."""
    q, k = qk(seed)
    size = 8 if kind == "antidiagonal" else 1
    grid = grid_of(q, k, (size, size))
    scores = (scores_of(q, k) * 0.4).masked_fill(~grid.past((1, 1)), -math.inf)
    mass = blocked(scores.softmax(-1).nan_to_num(), size, size)
    mass = mass.nansum(-1).nanmean(-1)
    if kind == "antidiagonal":
        chosen = antidiagonal_blocks(q, k, [], [], to_json(KEEP), 0.4, share, 1, size, size)
    else:
        chosen = pooled_blocks(q, k, [], [], to_json(KEEP), 0.4, share, 0.0, 1, 1)
    forced = grid.forced()
    held = (mass * chosen).sum(-1)
    assert (held >= share * mass.sum(-1) - 1e-5).all()
    free = (chosen & ~forced).expand_as(mass)
    least = mass.masked_fill(~free, math.inf).amin(-1)
    assert ((held - least)[free.any(-1)] < (share * mass.sum(-1))[free.any(-1)] + 1e-5).all()
    assert (chosen | ~forced).all()


def test_antidiagonals_by_the_letter() -> None:
    """The score of 4 x 4 positions is the mean over the antidiagonal, written out."""
    q, k = qk(3, 32, 32)
    keep = apply("le", K, Q)
    grid = grid_of(q, k, (8, 8), keep)
    scores = scores_of(q, k) * 0.4
    group = torch.empty(2, 4, 8, 8, dtype=torch.float64)
    for n in range(8):
        for m in range(8):
            group[:, :, n, m] = sum(scores[:, :, 4 * n + 3 - r, 4 * m + r] for r in range(4)) / 4
    mass = group.masked_fill(~grid.past((4, 4)), -math.inf).softmax(-1).nan_to_num()
    mass = mass.unflatten(3, (4, 2)).sum(4).unflatten(2, (4, 2)).mean(3)
    order = mass.argsort(-1, descending=True)
    chosen = antidiagonal_blocks(q, k, [], [], to_json(keep), 0.4, 0.6, 4, 8, 8)
    for b, h, line in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)).tolist():
        kept = {0, line}
        for block in order[b, h, line].tolist():
            if sum(float(mass[b, h, line, n]) for n in kept) >= 0.6 * float(mass[b, h, line].sum()) - 1e-9:
                break
            kept.add(block)
        assert set(chosen[b, h, line].nonzero().flatten().tolist()) == kept


def test_blocks_that_are_not_alike_are_computed() -> None:
    q, k = torch.ones(1, 2, 64, 8), torch.ones(1, 1, 64, 8)
    q[:, 1, 16:32] = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    k[:, :, 40:48] = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    keep = apply("le", K, Q)
    some = grid_of(q, k, (16, 8), keep).some[0, 0]
    chosen = pooled_blocks(q, k, [], [], to_json(keep), 1.0, 0.01, 0.9, 16, 8)
    assert torch.equal(chosen[0, 1, 1], some[1]), "queries that differ read every block"
    assert chosen[0, 0, 3, 5], "keys that differ are read"
    assert torch.equal(chosen[0, :, 3, 5], torch.tensor([True, True]))
    off = pooled_blocks(q, k, [], [], to_json(keep), 1.0, 0.01, 0.0, 16, 8)
    assert off.sum() < chosen.sum()


@few
@given(st.floats(0.2, 0.95), st.integers(1, 80), st.booleans(), st.integers(0, 99))
def test_verticals_and_slashes(coverage: float, probe: int, holes: bool, seed: int) -> None:
    """The union of the fewest columns and the fewest diagonals that hold the share of what probe rows read."""
    q, k = qk(seed)
    height, width = 16, 8
    real = torch.ones(2, KEYS, dtype=torch.bool)
    if holes:
        real = torch.rand(2, KEYS, generator=torch.Generator().manual_seed(seed)) < 0.7
    keep = apply("and", KEEP, load(0, (B, K), BOOL))
    chosen = vertical_slash_blocks(q, k, [real], [], to_json(keep), 0.4, coverage, probe, height, width)
    grid = BlockGrid((2, 4, ROWS, KEYS), (height, width), to_json(keep), [real], [], CPU)
    kept = (torch.arange(KEYS) <= torch.arange(ROWS)[:, None] + MORE)[None, None] & real[:, None, None]
    probs = (scores_of(q, k) * 0.4).masked_fill(~kept, -math.inf).softmax(-1).nan_to_num()
    for b in range(2):
        rows = [row for row in range(ROWS) if real[b, row + MORE]][-probe:]
        for h in range(4):
            columns, slashes = torch.zeros(-(-KEYS // width)), torch.zeros(-(-KEYS // height))
            for row in rows:
                for key in range(row + MORE + 1):
                    columns[key // width] += float(probs[b, h, row, key])
                    slashes[(row + MORE - key) // height] += float(probs[b, h, row, key])
            picked_columns, picked_slashes = fewest(columns, coverage), fewest(slashes, coverage, (0,))
            for row in range(ROWS):
                for key in range(row + MORE + 1):
                    wanted = key // width in picked_columns or (row + MORE - key) // height in picked_slashes
                    if wanted and real[b, key]:
                        assert chosen[b, h, row // height, key // width], (b, h, row, key)
            touched = chosen[b, h] & ~grid.forced()[b % grid.forced().shape[0], 0]
            for line, column in touched.nonzero().tolist():
                mine = [
                    (row + MORE - key) // height
                    for row in range(line * height, min(ROWS, line * height + height))
                    for key in range(column * width, min(KEYS, column * width + width))
                    if key <= row + MORE
                ]
                assert column in picked_columns or picked_slashes & set(mine), (b, h, line, column)


def fewest(mass: Tensor, share: float, first: tuple[int, ...] = ()) -> set[int]:
    """Return the places, with the `first` ones counted before the largest others, that hold a share."""
    total, kept = sum(float(mass[place]) for place in first), set(first)
    for place in (n for n in mass.argsort(descending=True).tolist() if n not in first):
        if total >= share * float(mass.sum()) - 1e-6 * max(1.0, float(mass.sum())):
            break
        kept.add(place)
        total += float(mass[place])
    return kept


@pytest.mark.parametrize("score", ["mean", "bound"])
def test_pages(score: str) -> None:
    """The best pages are those of the true mean over the group, or of a bound that no score exceeds."""
    q, k = qk(5, 1, 83)
    keep = apply("le", K, const(74))
    chosen = pages(q, k, [], [], to_json(keep), 40, 2, 8, score)
    assert (chosen.sum(-1) == 5).all()
    assert chosen[..., [0, 8, 9]].all(), "first page and the last two"
    assert not chosen[..., 10:].any(), "pages behind the end"
    scores = F.pad(scores_of(q, k)[..., :75], (0, 5), value=math.nan).unflatten(-1, (-1, 8))
    if score == "mean":
        value = scores.nanmean(-1).unflatten(1, (2, 2)).mean(2).repeat_interleave(2, 1)
    else:
        keys = F.pad(k[:, :, :75], (0, 0, 0, 5), value=math.nan).unflatten(2, (-1, 8)).repeat_interleave(2, 1).double()
        low, high = keys.nan_to_num(math.inf).amin(3), keys.nan_to_num(-math.inf).amax(3)
        query = q.double()
        value = torch.maximum(query * low, query * high).sum(-1)[:, :, None]
        assert (value >= scores.nan_to_num(-math.inf).amax(-1) - 1e-6).all()
    middle = value[..., 1:8]
    for b in range(2):
        for h in range(4):
            best = middle[b, h, 0].topk(2).indices + 1
            assert set(best.tolist()) == set(chosen[b, h, 0, 1:8].nonzero().flatten().add(1).tolist())


def test_ops_are_registered_with_fakes() -> None:
    ops.register()
    q, k = qk(1)
    head = (q, k, [], [], to_json(KEEP))
    calls = {
        torch.ops.eff.topk_blocks_v1: (0.3, 8, 8),
        torch.ops.eff.antidiagonal_blocks_v1: (0.4, 0.8, 4, 8, 8),
        torch.ops.eff.pooled_blocks_v1: (0.4, 0.8, 0.5, 8, 8),
        torch.ops.eff.vertical_slash_blocks_v1: (0.4, 0.8, 8, 16, 8),
    }
    for op, rest in calls.items():
        opcheck(op.default, (*head, *rest), test_utils=("test_schema", "test_faketensor"))
    chosen = torch.ops.eff.topk_blocks_v1(*head, 0.3, 8, 8)
    opcheck(
        torch.ops.eff.tail_blocks_v1.default, (*head, chosen, 20, 8, 8), test_utils=("test_schema", "test_faketensor")
    )
    one = (q[:, :, :1].clone(), k, [], [], to_json(apply("le", K, const(60))))
    opcheck(torch.ops.eff.pages_v1.default, (*one, 32, 2, 8, "mean"), test_utils=("test_schema", "test_faketensor"))
