"""Check the int8 kernels in the interpreter: against the reference that rounds alike, and against exact attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effcompile.codegen.triton import int8 as kernel
from effcompile.ops import flash
from effcompile.ops import int8_attention as op
from tests.support.attention import agree, draw

Call = dict[str, Any]


@st.composite
def calls(choose: st.DrawFn) -> Call:
    """Draw a call whose keys have a common offset, as real ones do."""
    batch, kv_heads, group = choose(st.integers(1, 2)), choose(st.integers(1, 2)), choose(st.integers(1, 2))
    rows, keys, width = choose(st.integers(1, 40)), choose(st.integers(1, 80)), choose(st.sampled_from((16, 32, 72)))
    dtype, seed = choose(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))), choose(st.integers(0, 99))
    given: Call = {
        "q": draw((batch, kv_heads * group, rows, width), dtype, seed),
        "k": (draw((batch, kv_heads, keys, width), torch.float32, seed + 1) + 3).to(dtype),
        "v": draw((batch, kv_heads, keys, choose(st.sampled_from((width, 24)))), dtype, seed + 2),
        "begin": None,
        "end": None,
        "left": choose(st.sampled_from((-1, 9))),
        "right": choose(st.sampled_from((-1, 0))),
        "offset": choose(st.sampled_from((keys - rows, 0))),
        "scale": choose(st.sampled_from((0.2, -0.2))),
    }
    if choose(st.booleans()):
        edges = st.lists(st.integers(0, keys), min_size=batch, max_size=batch)
        given["begin"], given["end"] = (torch.tensor(choose(edges), dtype=torch.int32) for _ in range(2))
    return given


@given(calls())
@settings(max_examples=settings.default.max_examples // 4)
def test_any_call_agrees_with_the_reference(given: Call) -> None:
    """Where float32 and float64 round one number to two neighbors, one product changes by a 127th of its block's largest."""
    wide = {key: x.double() if key in "qkv" else x for key, x in given.items()}
    out, lse = kernel.attend(**given)
    exact, exact_lse = op.int8_attention(**wide)
    assert not out.isnan().any()
    assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
    unit = max(torch.finfo(given["v"].dtype).eps, 2e-6)
    assert (out.double() - exact).abs().max() <= (2 * unit + 5e-3) * given["v"].abs().max()
    assert (out.double() - exact).abs().mean() <= (2 * unit + 1e-4) * given["v"].abs().max()
    there = exact_lse != -math.inf
    if there.any():
        assert (lse.double() - exact_lse)[there].abs().max() <= 2e-2


@pytest.mark.parametrize("width", [32, 72])
def test_integers_are_exact(width: int) -> None:
    """Integers up to 127, with a mean of 0 and 127 in every block, round to themselves."""
    generator = torch.Generator().manual_seed(0)
    q, half = (torch.randint(-127, 128, (1, 2, 64, width), generator=generator).float() for _ in range(2))
    k = torch.stack([half, -half], 3).flatten(2, 3)
    q[..., 0], k[..., 0] = 127.0, torch.tensor([127.0, -127.0]).repeat(64)
    v = draw((1, 2, 128, 24))
    given = {"begin": None, "end": None, "left": -1, "right": 0, "offset": 64}
    exact = flash.flash(q.double(), k.double(), v.double(), *given.values(), 1e-4, 0.0)
    agree(kernel.attend(q, k, v, **given, scale=1e-4), exact, v, scores=160.0)


def test_smoothing_is_what_makes_it_accurate() -> None:
    q, v = draw((1, 2, 40, 32)), draw((1, 2, 70, 32), seed=2)
    k = draw((1, 2, 70, 32), seed=1) + 20 * draw((1, 2, 1, 32), seed=3)
    given = {"begin": None, "end": None, "left": -1, "right": -1, "offset": 0}
    exact = flash.flash(q.double(), k.double(), v.double(), *given.values(), 0.18, 0.0)
    out, lse = kernel.attend(q, k, v, **given, scale=0.18)
    whole, scale = op.quantized(k, op.K_BLOCK)
    plain = flash.flash(q.double(), (whole * scale).double(), v.double(), *given.values(), 0.18, 0.0)
    assert (out - exact[0]).abs().max() < 0.05
    assert (plain[0] - exact[0]).abs().max() > 5 * (out - exact[0]).abs().max()
    assert (lse - exact[1]).abs().max() < 0.05


def test_padding_may_be_anything() -> None:
    q, k, v = draw((1, 2, 20, 32)), draw((1, 1, 70, 32), seed=1), draw((1, 1, 70, 32), seed=2)
    edges = {"begin": torch.tensor([3], dtype=torch.int32), "end": torch.tensor([50], dtype=torch.int32)}
    given = {**edges, "left": -1, "right": -1, "offset": 0, "scale": 0.2}
    out, lse = kernel.attend(q, k, v, **given)
    for x in (k, v):
        x[:, :, :3], x[:, :, 50:] = math.nan, math.inf
    again, again_lse = kernel.attend(q, k, v, **given)
    assert torch.equal(again, out)
    assert torch.equal(again_lse, lse)
