"""Check attention over run-time maps on the block-sparse kernel, in the interpreter, against the op's own body in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile.codegen.triton import attention_blocks as kernel
from effcompile.core.expr import BOOL, INT, TRUE, apply, const, load
from effcompile.core.expr_eval import to_json
from effcompile.core.mask import CAUSAL, B, K, Q
from effcompile.ops import attention_blocks as op
from effcompile.ops import attention_epilogue as epilogue
from tests.support.attention import draw

PREDICATES = {
    "full": TRUE,
    "causal": CAUSAL.keep,
    "offset": apply("le", K, apply("add", Q, const(5))),
    "window": apply("and", CAUSAL.keep, apply("le", apply("sub", Q, const(20)), K)),
    "padding": apply("and", CAUSAL.keep, load(0, (B, K), BOOL)),
    "padded rows": apply("and", load(0, (B, K), BOOL), load(0, (B, Q), BOOL)),
    "positions": apply("le", K, load(1, (Q,), INT)),
    "dilated": apply("eq", apply("mod", apply("sub", Q, K), const(3)), const(0)),
}


def call(
    name: str, rows: int, keys: int, chance: float, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[object, ...]:
    """Return the arguments of a call with random padding and a random map."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(rows, keys)
    padding = torch.arange(longest)[None] >= torch.tensor([[0], [longest // 3]])
    places = torch.randint(-1, keys, (rows,), generator=generator)
    chosen = torch.rand(2, 2, -(-rows // 16), -(-keys // 16), generator=generator) < chance
    q, k, v = (
        draw((2, 2, rows, 24), dtype, seed),
        draw((2, 1, keys, 24), dtype, seed + 1),
        draw((2, 1, keys, 24), dtype, seed + 2),
    )
    return q, k, v, chosen, [padding, places], [], to_json(PREDICATES[name]), "zero", 0.3, 16, 16


@given(
    st.sampled_from(sorted(PREDICATES)),
    st.integers(1, 40),
    st.integers(1, 50),
    st.sampled_from((0.0, 0.5, 1.0)),
    st.integers(0, 99),
    st.sampled_from((torch.float32, torch.bfloat16)),
)
@settings(max_examples=settings.default.max_examples // 4)
def test_any_predicate_and_map(name: str, rows: int, keys: int, chance: float, seed: int, dtype: torch.dtype) -> None:
    args = call(name, rows, keys, chance, seed, dtype)
    got = kernel.attend(*args)  # type: ignore[arg-type]
    exact = op.attention_blocks(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args))  # type: ignore[arg-type]
    unit = max(torch.finfo(dtype).eps, 2e-6)
    assert not got.isnan().any()
    assert (got.double() - exact).abs().max() <= 2 * unit * args[2].abs().max()  # type: ignore[union-attr]


def test_a_row_that_the_map_empties_gets_what_the_mask_keeps() -> None:
    args = list(call("causal", 40, 40, 0.0, 1))
    got = kernel.attend(*args)  # type: ignore[arg-type]
    args[3] = torch.ones_like(args[3])  # type: ignore[call-overload]
    torch.testing.assert_close(got, kernel.attend(*args), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


def test_what_the_kernel_does_not_take() -> None:
    assert kernel.takes("bfloat16", 128, 64, 64)
    assert not kernel.takes("float64", 128, 64, 64)
    assert not kernel.takes("bfloat16", 320, 64, 64)
    assert not kernel.takes("bfloat16", 128, 64, 40)


@given(st.sampled_from(("full", "causal", "window")), st.integers(1, 40), st.integers(0, 99), st.booleans())
@settings(max_examples=settings.default.max_examples // 8)
def test_the_epilogue_scales_rows_and_adds(name: str, rows: int, seed: int, plain: bool) -> None:
    """The twin of the op with LSE, row scale and addend, as replayed attention calls it."""
    q, k, v, chosen, *rest = call(name, rows, rows, 1.0, seed)
    assert isinstance(q, Tensor)
    scale, addend = draw((2, 2, rows), torch.float32, seed + 3).abs(), draw((2, 2, rows, 24), torch.float32, seed + 4)
    more = (None, None) if plain else (scale, addend)
    got, lse = kernel.attend_epilogue(q, k, v, chosen, *more, *rest)  # type: ignore[arg-type]
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in (q, k, v, chosen, *more)]
    exact, of_exact = epilogue.attention_epilogue(*wide, *rest)  # type: ignore[arg-type]
    assert torch.allclose(got.double(), exact, atol=1e-4)
    assert torch.allclose(lse.double(), of_exact.double(), atol=1e-4)
