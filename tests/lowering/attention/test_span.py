"""Check the kernel of one query over the filled part of a cache: lengths, batches, masks beside the range, rows without keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.core.expr import INT, KEY, TRUE, apply, axis, load
from effcompile.core.expr_eval import to_json
from effcompile.core.kernel import Supported
from effcompile.core.site import Refusal
from effcompile.lowering.attention.span import SdpaSpan
from effcompile.ops.attention import reference
from effcompile.ops.attention_span import attention_span
from tests.support.check import CPU, check_kernel, fresh, lowered, raise_attention

KEYS, LEAST = 300, torch.finfo(torch.float32).min
LENGTHS = (0, 1, 130, KEYS - 1, KEYS + 9, -1)  # of the last key: none and all of them, and past the end


def operands(count: int | list[int], dtype: torch.dtype = torch.float32, heads: int = 4) -> tuple[Tensor, ...]:
    """Return q `[2, 4, 1, 16]`, k `[2, heads, KEYS, 16]`, v `[2, heads, KEYS, 24]`, and the counter."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, 1, 16), (heads, KEYS, 16), (heads, KEYS, 24))
    q, k, v = (torch.randn(2, *size, generator=generator).to(dtype) for size in sizes)
    return q, k, v, torch.tensor(count)


def decode(rule: Callable[..., Tensor], fill: float | None = None) -> Callable[..., Tensor]:
    """Return a step of decode under a mask of places and the counter, which it then adds to."""

    def attention(q: Tensor, k: Tensor, v: Tensor, counter: Tensor, *more: Tensor) -> Tensor:
        mask = rule(torch.arange(KEYS), counter, *more)
        mask = mask[None, None, None] if mask.dim() == 1 else mask[:, None, None]
        counter.add_(1)
        if fill is not None:
            mask = torch.where(mask, 0.0, fill).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return attention


def filled(k: Tensor, counter: Tensor) -> Tensor:
    return k <= counter


@pytest.mark.parametrize(
    ("heads", "dtype"), [(4, torch.float32), (2, torch.float32), (1, torch.bfloat16), (2, torch.float64)]
)
def test_every_length(heads: int, dtype: torch.dtype) -> None:
    for count in LENGTHS:
        check_kernel("span", decode(filled), operands(count, dtype, heads))


@pytest.mark.parametrize("fill", [-torch.inf, LEAST])
def test_a_float_mask_and_a_row_without_keys(fill: float) -> None:
    for count in LENGTHS:
        check_kernel("span", decode(filled, fill), operands(count))


@pytest.mark.parametrize("fill", [None, LEAST])
def test_windows_padding_and_a_length_for_each_sequence(fill: float | None) -> None:
    window = decode(lambda k, t: (k <= t) & (k > t - 20), fill)
    each = decode(lambda k, t: k[None] <= t[:, None], fill)
    padded = decode(lambda k, t, real: (k[None] <= t) & (real != 0), fill)
    both = decode(lambda k, t, real: (k[None] <= t[:, None]) & real.bool(), fill)
    real = (torch.arange(KEYS)[None] >= torch.tensor([[3], [150]])).long()
    for first, second in ((7, 200), (299, 400), (-1, 20)):
        check_kernel("span", window, operands(first))
        check_kernel("span", each, operands([first, second]))
        check_kernel("span", padded, (*operands(second), real))
        check_kernel("span", padded, (*operands(first), real))  # the second sequence holds no key yet
        check_kernel("span", both, (*operands([first, second]), real))


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("rule", ["zero", "uniform"])
def test_sinks_scale_what_the_range_leaves(rule: str, heads: int) -> None:
    """The op is called as a gpt-oss layer would call it; its meaning is that of the raised op."""
    keep, empty = to_json(apply("le", axis(KEY), load(0, (), INT))), to_json(TRUE)
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(1))
    for count in (0, 130, KEYS + 2, -1):
        q, k, v, counter = operands(count, heads=heads)
        expected = reference(q, k, v, None, sinks, [counter], [], keep, "", empty, rule, 0.3, 0.0)
        span = torch.tensor([[0], [count]])
        torch.testing.assert_close(attention_span(q, k, v, None, sinks, span, rule, 0.3), expected)


def test_keys_that_are_not_there_are_not_read() -> None:
    """What lies past the counter may be anything, NaN included; the fallback under the mask tensor would not bear it."""
    raised = raise_attention(decode(filled), fresh(operands(7)))
    graph = lowered(raised, SdpaSpan())
    q, k, v, counter = operands(40)
    for x in (k, v):
        x[:, :, 41:] = torch.nan
    found = graph(q, k, v, counter)
    exact = F.scaled_dot_product_attention(*(x.double() for x in (q, k[:, :, :41], v[:, :, :41])))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    assert counter.item() == 41


def test_who_asks_for_something_else_is_told_why() -> None:
    def sites(function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> Supported | Refusal:
        return SdpaSpan().supports(raise_attention(function, fresh(args)).sites[0], CPU)

    known = decode(lambda k, t: k <= 77)
    biased = decode(lambda k, t: k <= t, -3.0)
    assert "is not data" in str(sites(known, operands(5)))
    assert "EFF-A207" in str(sites(biased, operands(5)))
    assert isinstance(sites(decode(filled), operands(5)), Supported)
