"""Compare attention with sink logits, on every kernel that takes them, with the written-out chain in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile.core.kernel import Supported
from effcompile.core.mask import Mask
from effcompile.core.site import Refusal
from effcompile.core.target import Target
from effcompile.ops.sinks import flash_cpu, gate
from effcompile.targets import devices
from tests.lowering.attention.test_kernels import LEAST, RULES, STYLES, make, padding, places
from tests.support.check import (
    CPU,
    all_kernels,
    check_kept,
    check_kernel,
    check_sites,
    fresh,
    kernels_of,
    lowered,
    raise_attention,
)

Rule = Callable[[Tensor, Tensor], Tensor]


def chain(rule: Rule | None, fill: float = LEAST, scale: float = 0.3) -> Callable[..., Tensor]:
    """Return attention as gpt-oss writes it: grouped heads repeated, mask added, the sink a further column, then dropped."""

    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *padding: Tensor) -> Tensor:
        k, v = (_repeat(x, q.shape[1] // k.shape[1]) for x in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) * scale
        seen = None if rule is None else rule(*places(q, k))
        for kept in padding:
            seen = kept[:, None, None, :] if seen is None else seen & kept[:, None, None, :]
        if seen is not None:
            low = fill if fill == -math.inf else max(fill, torch.finfo(q.dtype).min)
            scores = scores + torch.where(seen, 0.0, low).to(q.dtype)
        column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        scores = torch.cat([scores, column], dim=-1)
        scores = scores - scores.max(dim=-1, keepdim=True).values
        probs = torch.softmax(scores, dim=-1, dtype=scores.dtype)
        return torch.matmul(probs[..., :-1], v)

    return attention


def _repeat(x: Tensor, group: int) -> Tensor:
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, group, length, width).reshape(batch, heads * group, length, width)


def causal(q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def logits(heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return one sink a head, from one that takes nearly nothing to one that takes nearly all."""
    return torch.linspace(-4.0, 6.0, heads).to(dtype)


def operands(shape: tuple, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    q, k, v = make(*shape, dtype)
    return q, k, v, logits(q.shape[1], dtype)


SHAPES = [  # batch, (query heads, key heads), (queries, keys), (key width, value width)
    (2, (4, 4), (17, 17), (16, 16)),
    (2, (4, 2), (33, 33), (16, 16)),
    (1, (6, 1), (300, 300), (8, 8)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_causal_and_full(shape: tuple, dtype: torch.dtype) -> None:
    args = operands(shape, dtype)
    check_kernel("sdpa-causal", chain(causal), args)
    check_kernel("sdpa", chain(None), args)
    for kernel in ("dense", "blocked", "math"):
        check_kernel(kernel, chain(causal), args)


@pytest.mark.parametrize("fill", [-math.inf, LEAST, -1e9])
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str, fill: float) -> None:
    """Every kernel that takes a site: windows, chunks, prefixes, rows and blocks without keys."""
    for shape in ((1, (2, 1), (270, 513), (16, 16)), (2, (4, 2), (33, 33), (16, 24))):
        args = operands(shape)
        raised = raise_attention(chain(RULES[rule], fill), fresh(args))
        check_sites(chain(RULES[rule], fill), raised, args)
        assert {"math"} < {kernel.name for kernel in kernels_of(raised.sites)} or fill == -1e9


@pytest.mark.parametrize("rule", ["window", "chunk", "rows without keys"])
def test_blocked_in_bfloat16(rule: str) -> None:
    check_kernel("blocked", chain(RULES[rule]), operands((1, (2, 1), (270, 513), (16, 16)), torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("order", "fill"), list(itertools.product([False, True], [LEAST, -math.inf])))
def test_padding(style: str, order: bool, fill: float, dtype: torch.dtype) -> None:
    function = chain(causal if order else None, fill)
    for shape in (SHAPES[1], (3, (2, 2), (70, 70), (16, 8))):
        args = operands(shape, dtype)
        for kernel in ("padded", "blocked"):
            check_kernel(kernel, function, (*args, padding(shape[0], shape[2][1], style)))


@pytest.mark.parametrize("style", STYLES)
def test_decode_with_one_query(style: str) -> None:
    """One query sits at the last key; its mask is a row, which dense reads."""
    args = (*operands((2, (4, 2), (1, 65), (16, 16))), padding(2, 65, style))
    check_kernel("dense", chain(causal), args)
    check_kernel("sdpa", chain(None), args[:4])
    window = chain(RULES["window"])
    check_sites(window, raise_attention(window, fresh(args)), args)


@pytest.mark.parametrize("kernel", ["sdpa-causal", "blocked", "dense", "padded"])
def test_symbolic_sizes(kernel: str) -> None:
    args = operands(SHAPES[1])
    check_kernel(kernel, chain(causal), (*args, padding(2, 33, "left")) if kernel == "padded" else args, symbolic=True)


@pytest.mark.parametrize("sink", [-math.inf, LEAST / 2, -1e4, 1e4])
@pytest.mark.parametrize("fill", [LEAST, -math.inf])
def test_a_sink_that_takes_nothing_or_all(sink: float, fill: float) -> None:
    """A sink of -inf is none: a row without keys is then the mean of V, or NaN, as the fill says."""
    q, k, v, sinks = operands((2, (4, 2), (40, 40), (16, 16)))
    sinks = torch.where(torch.arange(4) % 2 == 0, sink, sinks)
    kept = padding(2, 40, "none")
    for kernel in ("padded", "blocked"):
        check_kernel(kernel, chain(causal, fill), (q, k, v, sinks, kept))
    check_kernel("blocked", chain(RULES["blocks without keys"], fill), (q, k, v, sinks))


def test_queries_whose_elements_do_not_lie_side_by_side() -> None:
    """Torch's flash kernel reads rows as if they were dense, and says nothing where they are not."""
    q, k, v, sinks = operands((2, (4, 4), (24, 24), (16, 16)))
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    assert q.stride(3) != 1
    for kernel in ("sdpa-causal", "blocked", "dense"):
        check_kernel(kernel, chain(causal), (q, k, v, sinks))


def test_sinks_of_another_dtype_and_a_float32_softmax() -> None:
    def wide(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        scores = (torch.matmul(q, k.transpose(2, 3)) * 0.25).to(torch.promote_types(q.dtype, torch.float32))
        rows, columns = places(q, k)
        scores = scores.masked_fill(columns > rows, LEAST)
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1].to(v.dtype) @ v

    q, k, v, sinks = operands(SHAPES[0], torch.bfloat16)
    for kernel in ("sdpa-causal", "blocked", "dense"):
        check_kernel(kernel, wide, (q, k, v, sinks.float()))


def test_an_opaque_mask_keeps_its_tensor() -> None:
    def opaque(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor) -> Tensor:
        scores = torch.cat([q @ k.transpose(2, 3) + mask, sinks.reshape(1, -1, 1, 1).expand(*q.shape[:3], 1)], -1)
        return torch.softmax(scores, -1)[..., :-1] @ v

    args = operands((2, (4, 4), (17, 17), (16, 16)))
    mask = torch.randn(2, 1, 17, 17).masked_fill(torch.rand(2, 1, 17, 17) > 0.7, -math.inf)
    mask[0, 0, 3] = -math.inf
    raised = raise_attention(opaque, fresh((*args, mask)))
    assert {kernel.name for kernel in kernels_of(raised.sites)} >= {"dense", "math"}
    check_sites(opaque, raised, (*args, mask))


def test_the_sink_column_must_be_dropped() -> None:
    """The near miss: what is dropped is the first key, or nothing."""

    def first(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        column = sinks.reshape(1, -1, 1, 1).expand(*q.shape[:3], 1)
        return torch.softmax(torch.cat([q @ k.transpose(2, 3), column], -1), -1)[..., 1:] @ v

    check_kept(first, operands(SHAPES[0]), "EFF-A101")


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(sorted(RULES)),
    st.sampled_from([LEAST, -math.inf]),
    st.sampled_from(STYLES),
)
def test_random_sites(
    batch: int, heads: tuple[int, int], rows: int, keys: int, rule: str, fill: float, style: str
) -> None:
    q, k, v = make(batch, heads, (rows, keys), (8, 8), torch.float32)
    args = (q, k, v, logits(heads[0]), padding(batch, keys, style))
    function = chain(RULES[rule], fill)
    check_sites(function, raise_attention(function, fresh(args)), args)


def test_the_factor_is_the_softmax_with_a_sink() -> None:
    q, k, v, sinks = (x.double() for x in operands((2, (4, 4), (9, 12), (8, 8))))
    out, lse = flash_cpu(q, k, v, None, False, 0.3)
    expected = chain(None)(q, k, v, sinks)
    torch.testing.assert_close(out * gate(lse, sinks), expected, rtol=1e-12, atol=1e-12)


def test_who_declines_and_why() -> None:
    """On a GPU no kernel gives the LSE; means over rows that are filled with another number are the tensor's business."""
    (site,) = raise_attention(chain(causal), operands(SHAPES[0])).sites
    for kernel in all_kernels():
        answer = kernel.supports(site, Target.parse("sm_90", devices()))
        assert kernel.name == "math" or isinstance(answer, Refusal)
        why = kernel.gradient(site)
        assert (why is None) == (kernel.name == "math"), kernel.name
    mask = Mask(keep=site.mask.keep, fill="-1000000000.0", empty_row="uniform")  # type: ignore[union-attr]
    names = {k.name for k in all_kernels() if isinstance(k.supports(replace(site, mask=mask), CPU), Supported)}
    assert "blocked" not in names
    assert "dense" in names


def test_no_score_tensor_is_left() -> None:
    """Nothing in the lowered graph has queries times keys elements: neither scores nor mask."""
    args = operands((1, (4, 2), (64, 64), (16, 16)))
    for kernel, rule in (("sdpa-causal", "offset"), ("blocked", "window")):
        raised = raise_attention(chain(RULES[rule]), fresh(args))
        graph = lowered(raised, next(k for k in all_kernels() if k.name == kernel))
        shapes = [tuple(n.meta["val"].shape) for n in graph.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
        assert not [shape for shape in shapes if shape[-2:] == (64, 64)], kernel
