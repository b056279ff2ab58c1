"""Compare the predicate that recognition recovers with the mask tensor that the model makes, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile.core.expr_eval import from_json
from effcompile.core.intervals import block_bounds
from effcompile.core.mask import Mask
from tests.support.check import AttentionInputs, Raised, flat, kernels_of, lowered, raise_attention
from tests.support.masks import BATCH, FINITE, HEADS, Named, Scene, additive, predicates, scene

WIDTH = 4
FILLS = (-math.inf, FINITE, -1e9)
sizes = st.tuples(st.integers(1, 11), st.integers(4, 13)).filter(lambda n: n[0] <= n[1])


def qkv(s: Scene, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(BATCH, HEADS, n, WIDTH, generator=draw) for n in (s.rows, s.columns, s.columns))  # type: ignore[return-value]


def operands(s: Scene, seed: int) -> list[Tensor]:
    return [*qkv(s, seed), s.padding, s.ids, s.lengths]


def model(mask: Named, offset: int, fill: float | None, form: int, chain: bool) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        kept = mask.build(Scene(q.shape[2], k.shape[2], padding, ids, lengths, offset))
        given = kept if fill is None else additive(kept, fill, form)
        if not chain:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=given)
        scores = torch.matmul(q, k.transpose(-1, -2)) * WIDTH**-0.5
        scores = scores.masked_fill(~given, FINITE) if fill is None else scores + given
        return torch.softmax(scores, -1) @ v

    return attention


def check_predicate(raised: Raised, args: list[Tensor], chain: bool) -> None:
    """Compare with the tensor that the model made: kept, addend, and the rule for rows without keys."""
    (site,), (call,) = raised.sites, raised.calls(*args)
    if not isinstance(site.mask, Mask):
        return
    given = (torch.ones(call.extents, dtype=torch.bool) if call.mask is None else call.mask).expand(call.extents)
    kept = call.grid(call.keep)
    expected = given if given.dtype == torch.bool else given > -1e8
    assert torch.equal(kept, expected), f"{site.mask} is not the mask"
    if call.bias:
        assert torch.equal(call.grid(call.bias)[kept], given[kept])
    elif given.dtype != torch.bool:
        assert bool((given[kept] == 0).all()), "an addend was dropped"
    empty = ~kept.any(-1)
    rule = call.empty_row
    if rule == "never":
        assert not bool(empty.any()), f"{site.mask} has rows without keys"
    elif rule == "uniform":
        soft = call.grid(call.soft) if call.soft else torch.ones_like(kept)
        assert torch.equal(soft[empty], (given > -math.inf)[empty] if given.dtype != torch.bool else soft[empty])
    elif given.dtype != torch.bool:
        assert bool((given[empty] == -math.inf).all()), f"rows without keys are not {rule}"
    check_blocks(call)


def check_blocks(call: AttentionInputs) -> None:
    """Assert that block bounds are sound: `every` keeps all pairs of the block, not `some` keeps none."""
    kept, (rows, columns) = call.grid(call.keep), call.extents[2:]
    for bq, bk in ((2, 3), (4, 4), (16, 16)):
        every, some = block_bounds(from_json(call.keep), call.extents, (bq, bk), call.loads, call.sizes, kept.device)
        pairs = torch.nn.functional.pad(kept, (0, -columns % bk, 0, -rows % bq), value=False)
        here = pairs.unflatten(3, (-1, bk)).unflatten(2, (-1, bq))
        there = torch.nn.functional.pad(~kept, (0, -columns % bk, 0, -rows % bq), value=False)
        gone = there.unflatten(3, (-1, bk)).unflatten(2, (-1, bq))
        assert not bool((every & gone.any(5).any(3)).any()), "a block that is not whole counts as whole"
        assert not bool((~some & here.any(5).any(3)).any()), "a block with kept pairs counts as empty"


def check_numbers(raised: Raised, function: Callable[..., Tensor], args: list[Tensor]) -> None:
    """Compare the reference and every kernel with eager."""
    expected = function(*args)
    runs = [("reference", raised.run)] + [(kernel.name, lowered(raised, kernel)) for kernel in kernels_of(raised.sites)]
    for name, run in runs:
        (found,) = flat(run(*args))
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=2e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@given(predicates(), sizes, st.sampled_from([None, *FILLS]), st.integers(0, 5), st.booleans(), st.integers(0, 999))
def test_static(mask: Named, extents: tuple[int, int], fill: float | None, form: int, chain: bool, seed: int) -> None:
    rows, columns = extents
    offset = seed % 3 * (columns - rows)
    function = model(mask, offset, fill, form, chain)
    raised = raise_attention(function, operands(scene(rows, columns, seed, offset), seed))
    assert len(raised.sites) == 1, [str(missed.refusal) for missed in raised.missed]
    for other in (seed + 1, seed + 2):  # data drawn after recognition
        args = operands(scene(rows, columns, other, offset), other)
        check_predicate(raised, args, chain)
        check_numbers(raised, function, args)


@settings(max_examples=max(20, settings.default.max_examples // 4))
@given(predicates(), st.sampled_from([None, *FILLS]), st.integers(0, 5), st.booleans(), st.integers(0, 999))
def test_symbolic(mask: Named, fill: float | None, form: int, chain: bool, seed: int) -> None:
    function = model(mask, seed % 3, fill, form, chain)
    raised = raise_attention(function, operands(scene(7, 11, seed), seed), symbolic=True)
    assert len(raised.sites) == 1, [str(missed.refusal) for missed in raised.missed]
    for rows, columns in ((7, 11), (5, 12), (8, 9)):
        args = operands(scene(rows, columns, seed + rows), seed)
        check_predicate(raised, args, chain)
        check_numbers(raised, function, args)


KNOWN = {
    "causal": lambda s: s.k <= s.q,
    "window(5)": lambda s: s.k >= s.q - 5,
    "causal & key-padding": lambda s: (s.k <= s.q) & s.padding[:, None, None],
    "causal & window(3)": lambda s: (s.q >= s.k) & (s.q - s.k < 4),
    "chunk(4) & causal": lambda s: (s.q // 4 == s.k // 4) & ~(s.k > s.q),
    "document & causal": lambda s: (s.ids[:, None, :11, None] == s.ids[:, None, None, :11]) & (s.k <= s.q),
    "prefix": lambda s: (s.k <= s.q) | (s.k < s.lengths[:, None, None, None]),
    "key-padding": lambda s: s.padding[:, None, None].expand(BATCH, 1, 11, 11),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("fill", [None, *FILLS[:2]])
def test_families_are_named(name: str, fill: float | None) -> None:
    """The predicates of the field come out under their names, whatever the fill."""
    function = model(Named(name, KNOWN[name]), 0, fill, 0, False)
    args = operands(scene(11, 11, 5), 5)
    raised = raise_attention(function, args)
    assert str(raised.sites[0].mask) == name
    check_predicate(raised, args, False)
    check_numbers(raised, function, args)


@pytest.mark.parametrize("name", ["causal", "window(5)", "causal & window(3)"])
def test_blocks_are_exact(name: str) -> None:
    """For causal order and windows the bounds are not only sound: a block is whole, empty or partial as it really is."""
    args = operands(scene(11, 11, 5), 5)
    (call,) = raise_attention(model(Named(name, KNOWN[name]), 0, None, 0, False), args).calls(*args)
    kept = call.grid(call.keep)[:1, :1]
    for block in (1, 2, 3, 4):
        every, some = block_bounds(from_json(call.keep), call.extents, (block, block), [], call.sizes, kept.device)
        tiles = F.pad(kept.float(), (0, -11 % block, 0, -11 % block), value=math.nan)
        tiles = tiles.unflatten(3, (-1, block)).unflatten(2, (-1, block)).movedim(3, 4).flatten(4)
        assert torch.equal(every, (tiles.nan_to_num(1.0) == 1).all(-1))
        assert torch.equal(some, (tiles == 1).any(-1))


def test_most_of_the_programs_are_recovered() -> None:
    """The property above holds for nothing but opaque masks too; this one says that it does not come to that."""
    counts = {True: 0, False: 0}

    @given(predicates())
    def count(mask: Named) -> None:
        raised = raise_attention(model(mask, 0, None, 0, False), operands(scene(7, 11, 0), 0))
        counts[isinstance(raised.sites[0].mask, Mask)] += 1

    count()
    assert counts[True] > 3 * counts[False], counts
