"""Compare attention over tokens that each head has in an order of its own with float64, token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile import ops
from effcompile.core.expr import TRUE
from effcompile.ops import native
from effcompile.ops.attention_ordered import attention_ordered
from tests.ops.test_attention_blocks import pairs, qkv, reference


def orders(heads: int, tokens: int, draw: torch.Generator) -> Tensor:
    """Return an order for each head of two sequences."""
    return torch.stack([torch.randperm(tokens, generator=draw) for _ in range(2 * heads)]).view(2, heads, tokens)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
    st.sampled_from([(16, 16), (24, 32), (64, 64)]),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.integers(0, 999),
)
def test_each_head_has_an_order_of_its_own(
    dtype: torch.dtype,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    mapped: int,
    compiled: bool,
    seed: int,
) -> None:
    """Queries and keys may differ in number; a row that the map empties reads all keys; views are read where they lie."""
    ops.register()
    draw = torch.Generator().manual_seed(seed)
    q, k, v = qkv(2, (3, 3), lengths, (40, 33), dtype, seed)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    q_order, k_order = orders(3, lengths[0], draw), orders(3, lengths[1], draw)
    counts = [-(-length // block) for length, block in zip(lengths, blocks)]
    chosen = torch.rand(2, mapped, *counts, generator=draw) < 0.5
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(native, "library", lambda source: None)
        found = attention_ordered(q, k, v, q_order, k_order, chosen, 0.3, *blocks)
    kept, allowed = pairs(chosen, TRUE, (2, 3, *lengths), [], blocks)
    kept = torch.where(kept.any(-1, keepdim=True), kept, allowed)
    q, k, v = (x.double().gather(2, o[..., None].expand_as(x)) for x, o in ((q, q_order), (k, k_order), (v, k_order)))
    exact, _ = reference(q, k, v, kept, 0.3)
    step = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    placed = found.gather(2, q_order[..., None].expand_as(found)).double()
    torch.testing.assert_close(placed, exact, rtol=step, atol=step)
