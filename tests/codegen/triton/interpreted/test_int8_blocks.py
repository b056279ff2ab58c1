"""Check int8 attention over run-time maps, in the interpreter, against the op's own body, which rounds alike, in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile.codegen.triton import int8_blocks as kernel
from effcompile.ops import int8_blocks as op
from tests.codegen.triton.interpreted.test_attention_blocks import PREDICATES, call


@given(
    st.sampled_from(sorted(PREDICATES)),
    st.integers(1, 40),
    st.integers(1, 80),
    st.sampled_from((0.0, 0.5, 1.0)),
    st.integers(0, 99),
    st.sampled_from((torch.float32, torch.bfloat16)),
)
@settings(max_examples=settings.default.max_examples // 4)
def test_any_predicate_and_map(name: str, rows: int, keys: int, chance: float, seed: int, dtype: torch.dtype) -> None:
    """Where float32 and float64 round one number to two neighbors, one product changes by a 127th of its block's largest."""
    args = call(name, rows, keys, chance, seed, dtype)
    got = kernel.attend(*args)  # type: ignore[arg-type]
    exact = op.int8_blocks(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args))  # type: ignore[arg-type]
    unit = max(torch.finfo(dtype).eps, 2e-6)
    most = args[2].abs().max()  # type: ignore[union-attr]
    assert got.dtype == dtype
    assert not got.isnan().any()
    assert (got.double() - exact).abs().max() <= (2 * unit + 5e-3) * most
    assert (got.double() - exact).abs().mean() <= (2 * unit + 2e-4) * most


def test_padded_keys_may_hold_anything() -> None:
    """They widen no scale: the result is that of zeros in their place."""
    args = list(call("padding", 40, 80, 1.0, 3))
    k = args[1].clone()  # type: ignore[union-attr]
    real = args[4][0][:, :80]  # type: ignore[index]
    padded = ~real[:, None, :, None].expand_as(k)
    args[1] = k.masked_fill(padded, 0.0)
    expected = kernel.attend(*args)  # type: ignore[arg-type]
    args[1] = k.masked_fill(padded, 1e30)
    assert torch.equal(kernel.attend(*args), expected)  # type: ignore[arg-type]
    assert torch.isfinite(expected).all()
