"""Check the decode kernels in the interpreter: pages of any cache, lists, splits, and the merge of the parts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile.codegen.triton import decode as kernel
from effcompile.core.errors import EffError
from effcompile.ops import flash
from effcompile.ops import paged_decode as op
from tests.support.attention import agree, draw

Call = dict[str, Any]


def call(
    lengths: list[int],
    *,
    rows: int = 1,
    size: int = 16,
    kv_heads: int = 1,
    group: int = 2,
    width: int = 24,
    **more: Any,
) -> Call:
    """Return a call over a contiguous cache whose unused tokens are NaN."""
    batch, places = len(lengths), -(-max(lengths) // size)
    dtype, seed, value_width = more.pop("dtype", torch.float32), more.pop("seed", 0), more.pop("value_width", width)
    operands: Call = {"q": draw((batch, kv_heads * group, rows, width), dtype, seed)}
    for name, columns, number in (("k", width, 1), ("v", value_width, 2)):
        cache = draw((batch, kv_heads, places * size, columns), dtype, seed + number)
        for row, length in enumerate(lengths):
            cache[row, :, length:] = math.nan
        operands[name] = cache.unflatten(2, (places, size))
    plain = {"table": None, "pages": None, "counts": None, "scale": 0.3, "softcap": 0.0, "splits": 0}
    return {**operands, "lengths": torch.tensor(lengths, dtype=torch.int32), **plain, **more}


def exact(given: Call) -> tuple[Tensor, Tensor]:
    """Return the float64 result on the same inputs."""
    wide = {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in given.items()}
    return op.paged_decode(**wide)


def check(given: Call) -> tuple[Tensor, Tensor]:
    """Run the kernels, compare with float64, and return the result."""
    got = kernel.attend(**given)
    agree(got, exact(given), given["v"], largest=float(given["v"].float().nan_to_num(0).abs().max()))
    return got


@st.composite
def calls(choose: st.DrawFn) -> Call:
    """Draw a call: any lengths, page size, lists and splits."""
    lengths = choose(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    rows, kv_heads = choose(st.integers(1, min(3, *lengths, 3))), choose(st.integers(1, 2))
    given = call(
        lengths,
        rows=rows,
        size=choose(st.sampled_from((4, 12, 16))),
        kv_heads=kv_heads,
        group=choose(st.sampled_from((1, 3, 8))),
        width=choose(st.sampled_from((16, 24, 72))),
        value_width=choose(st.sampled_from((16, 80))),
        dtype=choose(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))),
        softcap=choose(st.sampled_from((0.0, 4.0))),
        scale=choose(st.sampled_from((0.3, -0.3))),
        splits=choose(st.sampled_from((0, 1, 3))),
    )
    places = given["k"].shape[2]
    generator = torch.Generator().manual_seed(choose(st.integers(0, 99)))
    if choose(st.booleans()):
        order = torch.rand((len(lengths), kv_heads, places), generator=generator).argsort(-1)
        given["pages"] = order[..., : choose(st.integers(1, places))].to(torch.int32)
        if choose(st.booleans()):
            most = given["pages"].shape[2]
            given["counts"] = torch.randint(0, most + 1, (len(lengths), kv_heads), generator=generator).to(torch.int32)
    return given


@given(calls())
@settings(max_examples=settings.default.max_examples // 2)
def test_any_call_agrees_with_float64(given: Call) -> None:
    check(given)


def test_without_a_list_it_is_the_dense_op() -> None:
    given = call([37, 16], rows=2, kv_heads=2)
    got = check(given)
    for row, length in enumerate((37, 16)):
        k, v = (given[name][row : row + 1].flatten(2, 3)[:, :, :length].double() for name in "kv")
        dense = flash.flash(given["q"][row : row + 1].double(), k, v, None, None, -1, 0, length - 2, 0.3, 0.0)
        agree((got[0][row : row + 1], got[1][row : row + 1]), dense, v.float())


@pytest.mark.parametrize("splits", [1, 2, 5, 64])
def test_splitting_changes_the_rounding_only(splits: int) -> None:
    whole = check(call([75], splits=1))
    parts = check(call([75], splits=splits))
    for one, two in zip(parts, whole):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_a_pool_in_another_layout_gives_the_same() -> None:
    """Pages of all sequences in one pool, tokens before heads, in any order."""
    given = call([40, 25], kv_heads=2)
    table = torch.tensor([[4, 0, 2], [5, 1, 6]], dtype=torch.int32)
    pooled = {**given, "table": table}
    for name in "kv":
        pool = torch.full((7, 16, 2, 24), math.nan)
        for row in range(2):
            pool[table[row].long()] = given[name][row].permute(1, 2, 0, 3)
        pooled[name] = pool.permute(2, 0, 1, 3)[None]
    assert all(torch.equal(one, two) for one, two in zip(check(pooled), kernel.attend(**given)))


def test_disjoint_lists_merge() -> None:
    given = call([60])
    pages = torch.tensor([[[3, 0, 2, 1]]], dtype=torch.int32)
    parts = [kernel.attend(**{**given, "pages": pages[..., s]}) for s in (slice(0, 1), slice(1, 4))]
    agree(flash.merge(*parts), exact(given), given["v"], largest=4.0)


def test_a_later_token_is_not_seen() -> None:
    given = call([40], rows=3)
    out, lse = kernel.attend(**given)
    changed = {**given, "k": given["k"].clone(), "v": given["v"].clone()}
    for name in "kv":
        changed[name].flatten(2, 3)[:, :, 39] = 30.0
    again, again_lse = kernel.attend(**changed)
    assert torch.equal(again[:, :, :2], out[:, :, :2])
    assert torch.equal(again_lse[:, :, :2], lse[:, :, :2])
    assert not torch.equal(again[:, :, 2], out[:, :, 2])


def test_no_pages_give_zero() -> None:
    given = call([40], pages=torch.zeros(1, 1, 2, dtype=torch.int32), counts=torch.zeros(1, 1, dtype=torch.int32))
    out, lse = kernel.attend(**given)
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -math.inf).all()


def test_too_many_rows_are_refused() -> None:
    with pytest.raises(EffError, match=r"EFF-K104.*128 rows"):
        kernel.attend(**call([40], rows=33, group=4))
