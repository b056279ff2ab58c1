"""Check the block-sparse kernel in the interpreter: any lists against float64, the dense ends, the epilogue, and causal order."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile.codegen.triton import block_sparse as kernel
from effcompile.codegen.triton import launch
from effcompile.core.errors import EffError
from effcompile.ops import block_sparse as op
from effcompile.ops import flash
from tests.support.attention import agree, draw

Call = dict[str, Any]


def call(
    rows: int, keys: int, partial: Tensor, full: Tensor | None = None, *, heads: int = 2, width: int = 24, **more: Any
) -> Call:
    """Return the arguments of a call whose lists spell two maps `[B', H', Qb, Kb]`."""
    lists = (*op.lists(partial), *(op.lists(full) if full is not None else (None, None)))
    named = dict(zip(("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"), lists))
    dtype, batch, seed = more.pop("dtype", torch.float32), more.pop("batch", 1), more.pop("seed", 0)
    operands = {
        "q": draw((batch, heads, rows, width), dtype, seed),
        "k": draw((batch, more.pop("kv_heads", 1), keys, width), dtype, seed + 1),
    }
    operands["v"] = draw((*operands["k"].shape[:3], more.pop("value_width", width)), dtype, seed + 2)
    plain = dict.fromkeys(("begin", "end", "row_first", "row_last", "key_mask", "row_scale", "addend"))
    sizes = {
        "left": -1,
        "right": -1,
        "offset": keys - rows,
        "q_block": 16,
        "kv_block": 16,
        "scale": 0.3,
        "softcap": 0.0,
    }
    return {**operands, **named, **plain, **sizes, **more}


def exact(given: Call) -> tuple[Tensor, Tensor]:
    """Return the float64 result on the same inputs."""
    wide = {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in given.items()}
    return op.block_sparse(**wide)


def blocks(rows: int, keys: int, q_block: int = 16, kv_block: int = 16) -> tuple[int, int]:
    """Return how many blocks there are of queries and of keys."""
    return -(-rows // q_block), -(-keys // kv_block)


@st.composite
def calls(choose: st.DrawFn) -> Call:
    """Draw a call: any maps, also with empty rows, and everything else a call can have."""
    batch, kv_heads, group = choose(st.integers(1, 2)), choose(st.integers(1, 2)), choose(st.integers(1, 2))
    rows, keys = choose(st.integers(1, 40)), choose(st.integers(1, 70))
    q_block, kv_block = choose(st.sampled_from((16, 32))), choose(st.sampled_from((16, 32, 48)))
    heads = kv_heads * group
    lead = (choose(st.sampled_from((1, batch))), choose(st.sampled_from((1, kv_heads, heads))))
    shape = (*lead, *blocks(rows, keys, q_block, kv_block))
    generator = torch.Generator().manual_seed(choose(st.integers(0, 999)))
    chance = choose(st.sampled_from((0.0, 0.3, 1.0)))
    partial = torch.rand(shape, generator=generator) < chance
    full = (torch.rand(shape, generator=generator) < 0.4) & ~partial if choose(st.booleans()) else None
    side = st.one_of(st.just(-1), st.integers(0, 20))
    more: Call = {"left": choose(side), "right": choose(side)}
    if choose(st.booleans()):
        more["end"] = torch.tensor(
            choose(st.lists(st.integers(0, keys), min_size=batch, max_size=batch)), dtype=torch.int32
        )
    if choose(st.booleans()):
        for name in choose(st.sampled_from((("row_first",), ("row_last",), ("row_first", "row_last")))):
            size = (choose(st.sampled_from((1, batch))), rows)
            more[name] = torch.randint(-5, keys + 5, size, generator=generator).to(torch.int32)
    if choose(st.booleans()):
        size = (choose(st.sampled_from((1, batch))), keys)
        more["key_mask"] = (torch.rand(size, generator=generator) < 0.7).to(torch.uint8)
    if choose(st.booleans()):
        more["row_scale"] = torch.rand((batch, heads, rows), generator=generator)
    width = choose(st.sampled_from((16, 24, 40)))
    dtype = choose(st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
    if choose(st.booleans()):
        more["addend"] = draw((batch, heads, rows, width), dtype, 7)
    return call(
        rows, keys, partial, full, heads=heads, kv_heads=kv_heads, batch=batch, width=width, dtype=dtype, q_block=q_block,
        kv_block=kv_block, softcap=choose(st.sampled_from((0.0, 0.0, 4.0))), scale=choose(st.sampled_from((0.3, -0.2))), **more,
    )  # fmt: skip


@given(calls())
@settings(max_examples=settings.default.max_examples // 2)
def test_any_lists_agree_with_float64(given: Call) -> None:
    got = kernel.attend(**given)
    largest = given["v"].abs().max() + (0 if given["addend"] is None else given["addend"].abs().max())
    agree(got, exact(given), given["v"], largest=float(largest))


@pytest.mark.parametrize("full", [False, True])
def test_every_block_is_the_dense_op(full: bool) -> None:
    every = torch.ones(1, 1, *blocks(40, 50), dtype=torch.bool)
    given = call(40, 50, ~every if full else every, every if full else None)
    dense = flash.flash(given["q"].double(), given["k"].double(), given["v"].double(), None, None, -1, -1, 0, 0.3, 0.0)
    agree(kernel.attend(**given), dense, given["v"])


def test_partial_and_full_blocks_of_causal_order_are_causal() -> None:
    rows, keys = 50, 60
    first_row, last_row = torch.arange(0, 64, 16)[:, None] + 10, torch.arange(0, 64, 16)[:, None] + 25
    first_key, last_key = torch.arange(0, 64, 16)[None], torch.arange(15, 64, 16)[None]
    some, every = first_key <= last_row, last_key <= first_row
    given = call(rows, keys, (some & ~every)[None, None], (some & every)[None, None], right=0)
    dense = flash.flash(given["q"].double(), given["k"].double(), given["v"].double(), None, None, -1, 0, 10, 0.3, 0.0)
    out, lse = kernel.attend(**given)
    agree((out, lse), dense, given["v"])
    changed = {**given, "k": given["k"].clone(), "v": given["v"].clone()}
    changed["k"][:, :, 41:], changed["v"][:, :, 41:] = 50.0, math.nan
    again, again_lse = kernel.attend(**changed)
    assert torch.equal(again[:, :, :16], out[:, :, :16]), "rows whose blocks do not reach the change"
    assert torch.equal(again_lse[:, :, :31], lse[:, :, :31])
    changed["v"] = given["v"].clone()
    changed["v"][:, :, 41:] = -9.0
    assert torch.equal(kernel.attend(**changed)[0][:, :, :31], out[:, :, :31])


def test_rows_without_blocks_give_the_addend() -> None:
    none = torch.zeros(1, 1, *blocks(20, 20), dtype=torch.bool)
    addend = draw((1, 2, 20, 24), seed=5)
    out, lse = kernel.attend(**call(20, 20, none, addend=addend, row_scale=torch.full((1, 2, 20), 0.5)))
    assert torch.equal(out, addend)
    assert (lse == -math.inf).all()


def test_the_epilogue_restores_the_dense_output() -> None:
    """rho * O_sparse + R, with rho = exp(LSE_sparse - LSE_dense) and R what the dropped blocks gave, is the dense output."""
    chosen = torch.rand(1, 2, *blocks(40, 60), generator=torch.Generator().manual_seed(1)) < 0.4
    given = call(40, 60, chosen, offset=0)
    dense, dense_lse = flash.flash(
        given["q"].double(), given["k"].double(), given["v"].double(), None, None, -1, -1, 0, 0.3, 0.0
    )
    sparse, lse = kernel.attend(**given)
    share = torch.exp(lse - dense_lse)
    assert (share <= 1 + 1e-6).all()
    rest = (dense - share[..., None] * sparse.double()).float()
    again, _ = kernel.attend(**{**given, "row_scale": share.float(), "addend": rest})
    agree((again, dense_lse.float()), (dense, dense_lse), given["v"])


def test_disjoint_maps_merge() -> None:
    chosen = torch.rand(1, 2, *blocks(40, 60), generator=torch.Generator().manual_seed(2)) < 0.5
    parts = [kernel.attend(**call(40, 60, some, offset=0)) for some in (chosen, ~chosen)]
    given = call(40, 60, torch.ones_like(chosen), offset=0)
    agree(flash.merge(*parts), exact(given), given["v"])


def test_entries_past_the_count_are_not_read() -> None:
    chosen = torch.rand(1, 1, *blocks(40, 60), generator=torch.Generator().manual_seed(3)) < 0.5
    given = call(40, 60, chosen)
    used = torch.arange(given["kv_indices"].shape[-1]) < given["kv_num_blocks"][..., None]
    wild = torch.where(used, given["kv_indices"], 10**6).to(torch.int32)
    assert torch.equal(kernel.attend(**{**given, "kv_indices": wild})[0], kernel.attend(**given)[0])


@pytest.mark.parametrize("keys", [64, 50])
def test_descriptors_bring_the_same_tiles(keys: int) -> None:
    chosen = torch.rand(1, 1, *blocks(40, keys, 16, 32), generator=torch.Generator().manual_seed(4)) < 0.7
    some = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    given = call(40, keys, chosen & some, chosen & ~some, width=32, dtype=torch.float16, right=0, kv_block=32)
    shape = kernel.form("fp16", launch.SMALL, 32, 32, blocks=(16, 32))
    plain, fetched = (
        kernel.attend(**given, config=kernel.tiled(shape, 16, 16, 1, 1, tma=tma)) for tma in (False, True)
    )
    assert all(torch.equal(one, two) for one, two in zip(plain, fetched))


@pytest.mark.parametrize(
    "broken",
    [
        {"q_block": 20},
        {"kv_num_blocks": torch.zeros(1, 1, 9, dtype=torch.int32)},
        {"kv_num_blocks": torch.zeros(1, 3, 2, dtype=torch.int32)},
        {
            "full_kv_num_blocks": torch.zeros(1, 1, 1, dtype=torch.int32),
            "full_kv_indices": torch.zeros(1, 1, 1, 2, dtype=torch.int32),
        },
    ],
)
def test_lists_that_do_not_fit_are_refused(broken: Call) -> None:
    given = call(30, 30, torch.ones(1, 1, 2, 2, dtype=torch.bool))
    with pytest.raises(EffError, match="EFF-K105"):
        kernel.attend(**{**given, **broken})
