"""Check the dense kernel in the interpreter: against float64, and by the contracts that every attention here keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile.codegen.triton import flash as kernel
from effcompile.codegen.triton import launch
from effcompile.core.errors import EffError
from effcompile.ops import flash as op
from tests.support.attention import agree, draw

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Problem:
    """Hold one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    begin: Tensor | None = None
    end: Tensor | None = None
    left: int = -1
    right: int = -1
    offset: int = 0
    scale: float = 0.3
    softcap: float = 0.0

    def arguments(self) -> tuple[object, ...]:
        """Return everything behind q, k, v."""
        return (self.begin, self.end, self.left, self.right, self.offset, self.scale, self.softcap)

    def run(self, **how: object) -> tuple[Tensor, Tensor]:
        """Run the kernel."""
        return kernel.attend(self.q, self.k, self.v, *self.arguments(), **how)

    def exact(self) -> tuple[Tensor, Tensor]:
        """Return the float64 result on the same inputs."""
        return op.flash(self.q.double(), self.k.double(), self.v.double(), *self.arguments())


@st.composite
def problems(choose: st.DrawFn) -> Problem:
    """Draw a call: any head dimensions, lengths, groups, mask and dtype."""
    batch, kv_heads, group = choose(st.integers(1, 2)), choose(st.integers(1, 2)), choose(st.integers(1, 3))
    rows, keys = choose(st.integers(1, 40)), choose(st.integers(1, 40))
    width = choose(st.sampled_from((8, 16, 17, 24, 64, 72, 80, 96)))
    value_width = choose(st.sampled_from((width, width, 16, 40)))
    dtype, seed = choose(st.sampled_from(DTYPES)), choose(st.integers(0, 99))
    begin = end = None
    if choose(st.booleans()):
        edges = st.lists(st.integers(0, keys), min_size=batch, max_size=batch)
        begin, end = (torch.tensor(choose(edges), dtype=torch.int32) for _ in range(2))
    side = st.one_of(st.just(-1), st.integers(0, 20))
    return Problem(
        draw((batch, kv_heads * group, rows, width), dtype, seed),
        draw((batch, kv_heads, keys, width), dtype, seed + 1),
        draw((batch, kv_heads, keys, value_width), dtype, seed + 2),
        begin,
        end,
        choose(side),
        choose(side),
        choose(st.sampled_from((keys - rows, keys - rows, 0, -3))),
        choose(st.sampled_from((0.3, 1.0, -0.2, 0.0))),
        choose(st.sampled_from((0.0, 0.0, 5.0))),
    )


@given(problems(), st.booleans())
@settings(max_examples=settings.default.max_examples // 2)
def test_any_call_agrees_with_float64(problem: Problem, pack: bool) -> None:
    got = problem.run(pack=problem.q.shape[1] // problem.k.shape[1] if pack else 1)
    agree(got, problem.exact(), problem.v)


@pytest.mark.parametrize("width", [128, 192, 256])
def test_wide_heads(width: int) -> None:
    problem = Problem(
        draw((1, 2, 20, width)), draw((1, 1, 37, width), seed=1), draw((1, 1, 37, 128), seed=2), scale=0.1
    )
    agree(problem.run(), problem.exact(), problem.v)


def causal(rows: int, keys: int, **more: object) -> Problem:
    """Return a causal call with grouped heads."""
    q, k, v = draw((2, 2, rows, 24)), draw((2, 1, keys, 24), seed=1), draw((2, 1, keys, 24), seed=2)
    return Problem(q, k, v, **{"right": 0, "offset": keys - rows, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("left", [-1, 6])
def test_a_later_key_leaves_a_row_bit_identical(left: int) -> None:
    problem = causal(40, 40, left=left)
    out, lse = problem.run()
    k, v = problem.k.clone(), problem.v.clone()
    k[:, :, 23:], v[:, :, 23:] = 100.0, -7.0
    changed, changed_lse = Problem(problem.q, k, v, left=left, right=0).run()
    assert torch.equal(changed[:, :, :23], out[:, :, :23])
    assert torch.equal(changed_lse[:, :, :23], lse[:, :, :23])
    assert not torch.equal(changed[:, :, 23:], out[:, :, 23:])


def test_short_queries_are_the_last_rows() -> None:
    whole = causal(45, 45)
    part = Problem(whole.q[:, :, -7:], whole.k, whole.v, right=0, offset=38)
    out, lse = whole.run()
    short, short_lse = part.run()
    torch.testing.assert_close(short, out[:, :, -7:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(short_lse, lse[:, :, -7:], rtol=1e-5, atol=1e-6)


def test_disjoint_keys_merge() -> None:
    problem = causal(33, 50)
    edges = [torch.tensor(edge, dtype=torch.int32) for edge in ([0, 0], [19, 0], [50, 50])]
    parts = [
        Problem(problem.q, problem.k, problem.v, begin, end, right=0, offset=17).run() for begin, end in pairwise(edges)
    ]
    agree(op.merge(*parts), problem.exact(), problem.v)


def test_grouped_heads_are_repeated_ones() -> None:
    problem = causal(21, 40)
    k, v = (x.repeat_interleave(2, 1) for x in (problem.k, problem.v))
    repeated = Problem(problem.q, k, v, right=0, offset=19).run()
    assert all(torch.equal(one, two) for one, two in zip(problem.run(pack=1), repeated))


def test_ranges_are_single_sequences() -> None:
    begin, end = torch.tensor([3, 0], dtype=torch.int32), torch.tensor([40, 9], dtype=torch.int32)
    out, lse = causal(40, 40, begin=begin, end=end).run()
    for row in range(2):
        problem = causal(40, 40)
        first, last = int(begin[row]), int(end[row])
        k, v = (x[row : row + 1, :, first:last] for x in (problem.k, problem.v))
        one = Problem(problem.q[row : row + 1], k, v, right=0, offset=-first)
        exact = one.exact()
        agree((out[row : row + 1], lse[row : row + 1]), exact, problem.v)


def test_padding_may_be_anything() -> None:
    begin, end = torch.tensor([5, 0], dtype=torch.int32), torch.tensor([30, 0], dtype=torch.int32)
    problem = causal(40, 40, begin=begin, end=end)
    out, lse = problem.run()
    for x in (problem.k, problem.v):
        x[0, :, :5], x[0, :, 30:], x[1] = math.nan, math.inf, math.nan
    again, again_lse = problem.run()
    assert torch.equal(again, out)
    assert torch.equal(again_lse, lse)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert (lse[1] == -math.inf).all()
    assert (lse[0, :, :5] == -math.inf).all()


def test_any_layout_of_the_operands() -> None:
    together = draw((1, 40, 2, 3, 32), torch.float16)
    q, k, v = (together[:, :, :, part].transpose(1, 2) for part in range(3))
    odd = draw((1, 2, 40, 65), torch.float16)[..., 1::2]
    for problem in (Problem(q, k, v, right=0), Problem(q, odd, v[..., 5:22])):
        agree(problem.run(), problem.exact(), problem.v)


@pytest.mark.parametrize("keys", [16, 40])
def test_descriptors_bring_the_same_tiles(keys: int) -> None:
    begin, end = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([keys, 9], dtype=torch.int32)
    q, k, v = (draw((2, heads, keys, 32), torch.float16, seed) for seed, heads in enumerate((2, 1, 1)))
    assert launch.describable(k)
    tiles = [kernel.tiled(kernel.form("fp16", launch.SMALL, 32, 32), 16, 16, 1, 1, tma=tma) for tma in (False, True)]
    for problem in (Problem(q, k, v, right=0, left=7), Problem(q, k, v, begin, end)):
        plain, fetched = (problem.run(config=config) for config in tiles)
        assert all(torch.equal(one, two) for one, two in zip(plain, fetched))
        agree(fetched, problem.exact(), v)


def test_no_queries_and_no_keys() -> None:
    out, lse = Problem(draw((1, 2, 3, 16)), draw((1, 1, 0, 16)), draw((1, 1, 0, 16))).run()
    assert torch.equal(out, torch.zeros(1, 2, 3, 16))
    assert (lse == -math.inf).all()
    out, lse = Problem(draw((1, 2, 0, 16)), draw((1, 1, 4, 16)), draw((1, 1, 4, 16))).run()
    assert (out.shape, lse.shape) == ((1, 2, 0, 16), (1, 2, 0))


@pytest.mark.parametrize(
    ("code", "q", "k"),
    [
        ("EFF-K103", draw((1, 2, 3, 16), torch.float64), draw((1, 1, 3, 16), torch.float64)),
        ("EFF-K103", draw((1, 2, 3, 16)), draw((1, 1, 3, 16), torch.float16)),
        ("EFF-K104", draw((1, 3, 3, 16)), draw((1, 2, 3, 16))),
        ("EFF-K104", draw((1, 2, 3, 257)), draw((1, 1, 3, 257))),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(code: str, q: Tensor, k: Tensor) -> None:
    with pytest.raises(EffError, match=code):
        Problem(q, k, k).run()
