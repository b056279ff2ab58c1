"""Compare the C++ kernels of selectors with float64: mass of antidiagonals, the choice by a share, scores of pages, one query."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile.core.expr import BOOL, INT, TRUE, Expr, apply, const, load
from effcompile.core.expr_eval import to_json
from effcompile.core.mask import CAUSAL, B, H, K, Q
from effcompile.ops import attention_blocks as blocks
from effcompile.ops import native, probes
from effcompile.ops.block_choice import bisected, top_cdf
from effcompile.ops.block_grid import BlockGrid, alike, means
from effcompile.ops.page_stats import page_bounds, page_stats
from effcompile.ops.selectors import antidiagonal
from effcompile.ops.selectors.pages import pages
from tests.support.check import near

CPU = torch.device("cpu")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Return values with positions before heads in memory, as projections leave them."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn((shape[0], shape[2], shape[1], shape[3]), generator=draw).to(dtype).transpose(1, 2)


def test_every_source_is_built_here() -> None:
    """A mistake in a C++ source must not hide behind the torch operations."""
    assert all(native.library(source) is not None for source in native.KERNELS)


MASKS: dict[str, Expr] = {
    "full": TRUE,
    "causal": CAUSAL.keep,
    "offset": apply("le", K, apply("add", Q, const(7))),
    "padding": apply("and", CAUSAL.keep, load(0, (B, K), BOOL)),
    "heads": apply("or", CAUSAL.keep, apply("eq", H, const(1))),
}


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(MASKS)),
    DTYPES,
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.integers(1, 40),
    st.sampled_from([(16, 16, 1), (16, 32, 4), (32, 16, 16), (64, 64, 8), (128, 128, 16)]),
    st.integers(0, 999),
)
def test_antidiagonal_mass(
    named: str, dtype: torch.dtype, lengths: tuple[int, int], width: int, sizes: tuple[int, int, int], seed: int
) -> None:
    rows, keys = lengths
    q, k = drawn((2, 4, rows, width), dtype, seed), drawn((2, 2, keys, width), dtype, seed + 1)
    loads = [torch.rand(2, keys, generator=torch.Generator().manual_seed(seed)) < 0.6] if named == "padding" else []
    grid = BlockGrid((2, 4, rows, keys), sizes[:2], to_json(MASKS[named]), loads, [], CPU)
    found = antidiagonal._compiled(q, k, grid, 0.4, sizes[2])
    exact = antidiagonal.antidiagonal_mass(q.double(), k.double(), grid, 0.4, sizes[2])
    # Products of bfloat16 and float16 are exact in float32, so the mass is float's own in every dtype.
    torch.testing.assert_close(found.double(), exact, rtol=2e-4, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 0.999), st.integers(1, 70), st.sampled_from(["spread", "even", "zeros"]), st.integers(0, 999))
def test_top_cdf(share: float, columns: int, kind: str, seed: int) -> None:
    """The same choice as torch operations make in float64, unless a sum lies within rounding of the share."""
    draw = torch.Generator().manual_seed(seed)
    mass = torch.rand(2, 3, 5, columns, generator=draw).pow(6)
    if kind == "even":
        mass = torch.randint(0, 3, mass.shape, generator=draw).float()
    elif kind == "zeros":
        mass = mass * (torch.rand(mass.shape, generator=draw) < 0.3)
    some = torch.rand(1, 3, 5, columns, generator=draw) < 0.8
    forced = torch.rand(2, 1, 1, columns, generator=draw) < 0.2
    found, exact = top_cdf(mass, share, some, forced), bisected(mass.double(), share, some, forced)
    for row in (found != exact).any(-1).nonzero().tolist():
        at = tuple(row)
        wanted = share * float((mass * some)[at].double().sum())
        near_by = float((mass * exact)[at].double().sum())
        assert math.isclose(near_by, wanted, rel_tol=1e-5) or math.isclose(
            float((mass * found)[at].double().sum()), wanted, rel_tol=1e-5
        )


def test_top_cdf_takes_any_strides_and_the_whole() -> None:
    mass = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    yes, no = torch.tensor(True), torch.tensor(False)
    assert torch.equal(top_cdf(mass.t(), 0.5, yes, no), bisected(mass.t().contiguous(), 0.5, yes, no))
    assert top_cdf(mass, 1.0, yes, no).all()
    assert top_cdf(mass[:0], 0.5, yes, no).shape == (0, 6)


# --- pages ---------------------------------------------------------------------------------------------------------------------

STEPS: dict[str, Expr] = {
    "full": TRUE,
    "place": apply("le", K, load(1, (Q,), INT)),
    "window": apply("and", apply("le", K, load(1, (Q,), INT)), apply("lt", load(2, (Q,), INT), K)),
    "padding": apply("and", apply("le", K, load(1, (Q,), INT)), load(0, (B, K), BOOL)),
    "heads": apply("or", apply("le", K, const(3)), apply("eq", H, const(1))),
}


def step(
    seed: int, keys: int, widths: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    q, k = drawn((2, 6, 1, widths[0]), dtype, seed), drawn((2, 2, keys, widths[0]), dtype, seed + 1)
    v = drawn((2, 2, keys, widths[1]), dtype, seed + 2)
    place = torch.randint(0, keys, (1,), generator=draw)
    loads = [torch.rand(2, keys, generator=draw) < 0.6, place, place - 40]
    return q, k, v, loads


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(STEPS)),
    DTYPES,
    st.integers(1, 900),
    st.tuples(st.integers(1, 80), st.integers(1, 80)),
    st.integers(1, 40),
    st.sampled_from([1, 2, 6]),
    st.integers(0, 999),
)
def test_one_query_over_chosen_pages(
    named: str, dtype: torch.dtype, keys: int, widths: tuple[int, int], page: int, map_heads: int, seed: int
) -> None:
    q, k, v, loads = step(seed, keys, widths, dtype)
    count = -(-keys // page)
    chosen = torch.rand(2, map_heads, 1, count, generator=torch.Generator().manual_seed(seed)) < 0.5
    arguments = (chosen, loads, [], to_json(STEPS[named]), 0.3, 1, page)
    one = (*arguments[:5], page)
    out, lse = blocks.compiled(q, k, v, *arguments) if named == "heads" else blocks.one_query(q, k, v, *one)
    expected, _ = blocks.gathered(q, k, v, *arguments)
    exact, exact_lse = blocks.gathered(q.double(), k.double(), v.double(), *arguments)
    exact_lse = exact_lse.double()
    near([out], [expected], [exact], named)
    assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=2e-5)
    whole = blocks.attention_blocks(q, k, v, *arguments[:4], "zero", *arguments[4:])
    alive = lse != -math.inf
    assert torch.equal(whole[alive], out[alive])


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(STEPS)),
    st.sampled_from(["mean", "bound"]),
    DTYPES,
    st.integers(1, 300),
    st.integers(1, 80),
    st.sampled_from([1, 8, 16]),
    st.integers(0, 999),
)
def test_pages_are_those_of_the_best_scores(
    named: str, score: str, dtype: torch.dtype, keys: int, width: int, page: int, seed: int
) -> None:
    q, k, _, loads = step(seed, keys, (width, 1), dtype)
    chosen = pages(q, k, loads, [], to_json(STEPS[named]), 6 * page, 2, page, score)
    grid = BlockGrid((2, 6, 1, keys), (1, page), to_json(STEPS[named]), loads, [], CPU)
    real = None if grid.limits.keys is None else grid.limits.keys.bool()
    wide = k.double()
    if score == "bound":
        value = page_bounds(q.double(), page_stats(wide, page, real))
    else:
        value = q.double() @ _means(wide, page, real).repeat_interleave(3, 1).transpose(-1, -2)
        value = value.unflatten(1, (2, 3)).mean(2).repeat_interleave(3, 1)
    forced, free = grid.forced(2), grid.some & ~grid.forced(2)
    assert torch.equal(chosen & ~free, (forced & ~free).expand_as(chosen))
    count = (6 - forced.sum(-1)).clamp(min=0)
    assert torch.equal((chosen & free).sum(-1), torch.minimum(count, free.sum(-1)).expand(2, 6, 1))
    worst = value.masked_fill(~(chosen & free), math.inf).amin(-1)
    best = value.masked_fill(chosen | ~free, -math.inf).amax(-1)
    assert (worst >= best - 1e-4 * (1 + best.abs().nan_to_num(posinf=0))).all()


def test_pages_with_nan_come_last() -> None:
    q, k, _, _ = step(1, 320, (16, 1), torch.float32)
    k[:, :, 100:110] = math.nan
    chosen = pages(q, k, [], [], to_json(TRUE), 10 * 16, 2, 16, "bound")
    assert (chosen.sum(-1) == 10).all()
    assert not chosen[..., 6].any()


def _means(k: Tensor, page: int, real: Tensor | None) -> Tensor:
    count = -(-k.shape[2] // page)
    found = torch.zeros(*k.shape[:2], count, k.shape[3], dtype=torch.float64)
    for n in range(count):
        part = slice(n * page, n * page + page)
        for b in range(k.shape[0]):
            mine = torch.ones(k[:, :, part].shape[2], dtype=torch.bool) if real is None else real[b % len(real), part]
            if mine.any():
                found[b, :, n] = k[b, :, part][:, mine].mean(1)
    return found


def test_threads_change_no_bit() -> None:
    q, k, v, loads = step(3, 3000, (64, 64), torch.float32)
    chosen = torch.rand(2, 6, 1, 188, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = drawn((1, 4, 700, 64), torch.float32, 0)
    grid = BlockGrid((1, 4, 700, 700), (128, 128), to_json(CAUSAL.keep), [], [], CPU)

    def run() -> tuple[Tensor, ...]:
        return (
            *blocks.one_query(q, k, v, chosen, loads, [], to_json(STEPS["padding"]), 0.1, 16),
            antidiagonal._compiled(whole, whole, grid, 0.125, 16),
        )

    threads = torch.get_num_threads()
    first = run()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert all(torch.equal(x, y) for x, y in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("source", [native.SCORES, native.PAGES])
def test_without_a_compiler_torch_operations_choose(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _, loads = step(5, 200, (16, 16), torch.float32)
    long = drawn((2, 6, 200, 16), torch.float32, 1)

    def run() -> Tensor:
        if source == native.PAGES:
            return pages(q, k, loads, [], to_json(STEPS["padding"]), 64, 2, 8, "bound")
        return antidiagonal.antidiagonal_blocks(long, k, [], [], to_json(CAUSAL.keep), 0.25, 0.7, 4, 16, 16)

    found = run()
    monkeypatch.setattr(native, "library", lambda source: None)
    assert torch.equal(run(), found)


# --- probe rows, means of blocks ---------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["causal", "offset", "padding", "window"]),
    DTYPES,
    st.tuples(st.integers(1, 90), st.integers(1, 600)),
    st.integers(1, 40),
    st.sampled_from([None, 1, 16, 100]),
    st.integers(0, 999),
)
def test_probe_rows(
    named: str, dtype: torch.dtype, lengths: tuple[int, int], width: int, bin_width: int | None, seed: int
) -> None:
    rows, keys = lengths
    draw = torch.Generator().manual_seed(seed)
    q, k = drawn((2, 4, rows, width), dtype, seed), drawn((2, 2, keys, width), dtype, seed + 1)
    window = apply("and", MASKS["offset"], apply("le", apply("sub", Q, const(30)), K))
    loads = [torch.rand(2, keys, generator=draw) < 0.6] if named == "padding" else []
    grid = BlockGrid((2, 4, rows, keys), (16, 16), to_json(MASKS.get(named, window)), loads, [], CPU)
    picked = torch.randint(0, rows, (2, 7), generator=draw)
    valid = torch.rand(2, 7, generator=draw) < 0.8
    found = probes.probe(q, k, picked, valid, grid, 0.4, bin_width)
    index = picked[:, None, :, None].expand(2, 4, -1, width)
    exact = probes.composed(q.gather(2, index).double(), k.double(), picked, valid, grid, 0.4, bin_width)
    torch.testing.assert_close(found.columns.double(), exact.columns, rtol=2e-4, atol=1e-5)
    assert torch.equal(found.seen, exact.seen)
    assert (found.slashes is None) == (bin_width is None)
    if found.slashes is not None and exact.slashes is not None:
        torch.testing.assert_close(found.slashes.double(), exact.slashes, rtol=2e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(DTYPES, st.integers(1, 200), st.integers(1, 80), st.sampled_from([1, 8, 64]), st.booleans(), st.integers(0, 999))
def test_means_of_blocks(dtype: torch.dtype, length: int, width: int, unit: int, holes: bool, seed: int) -> None:
    x = drawn((2, 3, length, width), dtype, seed)
    real = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.5 if holes else None
    mean, cosine = alike(x, unit, real)
    assert torch.equal(mean, means(x, unit, real))
    torch.testing.assert_close(mean.double(), means(x.double(), unit, real), rtol=1e-5, atol=1e-5)
    directions = torch.nn.functional.normalize(x.double(), dim=-1)
    exact = means(directions, unit, real).square().sum(-1)
    torch.testing.assert_close(cosine.double(), exact, rtol=1e-4, atol=1e-6)
