"""Compare every attention kernel with attention in float64: its error is at most twice eager's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.core.expr import walk
from effcompile.core.kernel import Supported
from effcompile.core.mask import Mask
from effcompile.core.site import Refusal
from effcompile.core.target import Target
from effcompile.targets import devices
from tests.support.check import CPU, all_kernels, check_kernel, kernels_of, raise_attention

LEAST = torch.finfo(torch.float32).min
DTYPES = (torch.float32, torch.bfloat16)


def make(
    batch: int, heads: tuple[int, int], lengths: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v with transposed strides, as projections give them."""
    draw = torch.Generator().manual_seed(sum(lengths) + batch)
    shapes = zip((heads[0], heads[1], heads[1]), (lengths[0], *[lengths[1]] * 2), (widths[0], *widths))
    rows = [torch.randn(batch, n, h, d, generator=draw).to(dtype).transpose(1, 2) for h, n, d in shapes]
    return rows[0], rows[1], rows[2]


def padding(batch: int, length: int, style: str) -> Tensor:
    """Return kept keys `[B, K]`: left or right padding, holes, one sequence without any key, or all kept."""
    kept = torch.ones(batch, length, dtype=torch.bool)
    for number in range(batch):
        edge = min(number * max(1, length // 3), length)
        if style == "left":
            kept[number, :edge] = False
        elif style == "right":
            kept[number, length - edge :] = False
        elif style == "holes":
            kept[number, number :: 2 + number] = False
        elif style == "none" and number == 0:
            kept[number] = False
    return kept


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=bool(q.shape[1] != k.shape[1]))


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=bool(q.shape[1] != k.shape[1]))


def places(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2]), torch.arange(k.shape[2])[None]


def masked(rule: Callable[[Tensor, Tensor], Tensor], fill: float | None = None) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept = rule(*places(q, k))
        mask = kept if fill is None else torch.zeros(kept.shape, dtype=q.dtype).masked_fill(~kept, fill)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=bool(q.shape[1] != k.shape[1]))

    return attention


def padded(causal: bool, soft: bool) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        seen = kept[:, None, None, :].expand(q.shape[0], 1, q.shape[2], k.shape[2])
        if causal:
            rows, columns = places(q, k)
            seen = seen & (columns <= rows)
        least = torch.finfo(q.dtype).min
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, least) if soft else seen
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=bool(q.shape[1] != k.shape[1]))

    return attention


SHAPES = [  # batch, (query heads, key heads), (queries, keys), (key width, value width)
    (2, (4, 4), (17, 17), (16, 16)),
    (2, (4, 2), (33, 33), (16, 24)),
    (1, (6, 1), (300, 300), (8, 8)),
    (3, (2, 2), (1, 1), (16, 16)),
]
UNEQUAL = [(2, (4, 2), (7, 300), (16, 16)), (1, (2, 2), (1, 65), (8, 16)), (1, (2, 1), (270, 513), (16, 16))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *UNEQUAL])
def test_sdpa(shape: tuple, dtype: torch.dtype) -> None:
    check_kernel("sdpa", full, make(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_causal(shape: tuple, dtype: torch.dtype) -> None:
    check_kernel("sdpa-causal", causal, make(*shape, dtype))
    check_kernel("sdpa-causal", masked(lambda q, k: k <= q, LEAST), make(*shape, torch.float32))


@pytest.mark.parametrize("kernel", ["dense", "blocked"])
@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (300, 129)])
def test_is_causal_over_unequal_lengths_counts_from_the_first_key(kernel: str, lengths: tuple[int, int]) -> None:
    check_kernel(kernel, causal, make(2, (2, 2), lengths, (16, 16), torch.float32))


RULES = {
    "offset": lambda q, k: k <= q,
    "window": lambda q, k: (k <= q) & (k > q - 20),
    "two-sided": lambda q, k: (q - k).abs() < 40,
    "chunk": lambda q, k: (q // 16 == k // 16) & (k <= q),
    "prefix": lambda q, k: (k <= q) | (k < 20),
    "sink-window": lambda q, k: (k <= q) & ((k > q - 64) | (k < 4)),
    "dilated": lambda q, k: ((q - k) % 3 == 0) & (k <= q),
    "dilated sum": lambda q, k: (q - k) % 3 * 2 + (q + k) % 5 <= 4,
    "rows without keys": lambda q, k: (k <= q) & (q % 5 > 0),
    "blocks without keys": lambda q, k: (k <= q - 260) | (q < 3),
}


@pytest.mark.parametrize("fill", [None, -math.inf, LEAST])
@pytest.mark.parametrize("rule", RULES)
def test_blocked(rule: str, fill: float | None) -> None:
    for shape in (UNEQUAL[2], (2, (4, 2), (33, 33), (16, 24)), (1, (2, 2), (300, 300), (16, 16))):
        check_kernel("blocked", masked(RULES[rule], fill), make(*shape, torch.float32))


@pytest.mark.parametrize("rule", ["window", "chunk", "rows without keys"])
def test_blocked_in_bfloat16(rule: str) -> None:
    check_kernel("blocked", masked(RULES[rule]), make(*UNEQUAL[2], torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["offset", "window", "rows without keys"])
def test_dense(rule: str, dtype: torch.dtype) -> None:
    for fill in (None, -math.inf, torch.finfo(dtype).min):
        check_kernel("dense", masked(RULES[rule], fill), make(*UNEQUAL[0], dtype))


def captures_a_size(function: Callable[..., Tensor], args: Sequence[Tensor]) -> bool:
    """Tell whether the recovered mask refers to a size or a tensor when sizes are symbolic."""
    (site,) = raise_attention(function, list(args), symbolic=True).sites
    assert isinstance(site.mask, Mask)
    return any(part.op in ("size", "load") for part in walk(site.mask.keep))


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_flex(rule: str, symbolic: bool) -> None:
    for fill in (None, -math.inf):
        args = make(*UNEQUAL[2], torch.float32)
        if symbolic and captures_a_size(masked(RULES[rule], fill), args):
            with pytest.raises(AssertionError, match="EFF-A211"):
                check_kernel("flex", masked(RULES[rule], fill), args, symbolic=True)
        else:
            check_kernel("flex", masked(RULES[rule], fill), args, symbolic=symbolic)


STYLES = ("left", "right", "holes", "none", "all")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("order", "soft"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("kernel", ["padded", "blocked"])
def test_padded(kernel: str, style: str, order: bool, soft: bool) -> None:
    for shape in (SHAPES[1], (3, (2, 2), (70, 70), (16, 8))):
        q, k, v = make(*shape, torch.float32)
        check_kernel(kernel, padded(order, soft), (q, k, v, padding(q.shape[0], k.shape[2], style)))


@pytest.mark.parametrize("style", STYLES)
def test_padded_in_bfloat16(style: str) -> None:
    q, k, v = make(*SHAPES[1], torch.bfloat16)
    check_kernel("padded", padded(True, True), (q, k, v, padding(2, 33, style)))


@pytest.mark.parametrize("style", STYLES)
def test_padded_cross_attention(style: str) -> None:
    q, k, v = make(3, (4, 2), (9, 40), (16, 16), torch.float32)
    check_kernel("padded", padded(False, False), (q, k, v, padding(3, 40, style)))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kernel", ["padded", "blocked"])
def test_a_padding_made_for_more_keys_and_sequences(kernel: str, style: str) -> None:
    """The mask tensor of a model may be longer than this call's keys: only its beginning counts."""

    def attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        mask = kept[: q.shape[0], None, None, : k.shape[2]]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    args = make(2, (2, 2), (12, 20), (16, 16), torch.float32)
    check_kernel(kernel, attention, (*args, padding(3, 33, style)))


@pytest.mark.parametrize("kernel", ["padded", "blocked", "dense"])
def test_sequences_with_other_holes_of_one_span(kernel: str) -> None:
    """Both sequences keep their first and last key; what they miss between differs."""
    kept = torch.ones(2, 10, dtype=torch.bool)
    kept[0, 3] = kept[1, 6] = False
    for order in (False, True):
        check_kernel(kernel, padded(order, False), (*make(2, (2, 2), (10, 10), (16, 16), torch.float32), kept))


@pytest.mark.parametrize("kernel", ["padded", "blocked"])
def test_symbolic_sizes(kernel: str) -> None:
    args = make(2, (4, 2), (33, 33), (16, 16), torch.float32)
    check_kernel(kernel, padded(True, True), (*args, padding(2, 33, "left")), symbolic=True)


def chain(
    scale: float = 1.0, softcap: float = 0.0, sinks: bool = False, fill: float | None = None, wide: bool = False
) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, column: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        if wide:
            scores = scores.float()
        if fill is not None:
            rows, columns = places(q, k)
            scores = scores + torch.where((columns <= rows) & (rows % 7 > 0), 0.0, fill).to(scores.dtype)
        if sinks:
            scores = torch.cat([scores, column.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
            scores = scores - scores.max(-1, keepdim=True).values
        probs = torch.softmax(scores, -1, dtype=torch.float32 if q.dtype != torch.float64 else None).to(q.dtype)
        return torch.matmul(probs[..., :-1] if sinks else probs, v)

    return attention


CHAINS = {
    "plain": chain(0.25),
    "masked": chain(0.25, fill=LEAST),
    "infinite": chain(0.25, fill=-math.inf),
    "softcap": chain(0.25, softcap=5.0, fill=LEAST),
    "sinks": chain(0.25, sinks=True, fill=LEAST),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("lengths", [(7, 7), (3, 20)])
def test_math_and_all_others_on_a_written_out_chain(name: str, lengths: tuple[int, int]) -> None:
    q, k, v = make(2, (4, 4), lengths, (16, 8), torch.float32)
    args = (q, k, v, torch.randn(4))
    check_kernel("math", CHAINS[name], args)
    for kernel in kernels_of(raise_attention(CHAINS[name], args).sites):
        check_kernel(kernel.name, CHAINS[name], args)


def test_a_float32_mask_on_bfloat16_scores_keeps_its_precision() -> None:
    """ALiBi in float32 must not be rounded to bfloat16, and the least float32 must not become -inf."""

    def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, columns = places(q, k)
        scores = torch.matmul(q, k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
        return torch.softmax(scores + ((columns - rows) * -3.37 + 500.3), -1).to(v.dtype) @ v

    def padding_mask(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
        mask = torch.zeros(kept.shape).masked_fill(~kept, LEAST)[:, None, None]
        return torch.softmax(scores + mask, -1).to(v.dtype) @ v

    args = make(2, (2, 2), (9, 9), (16, 16), torch.bfloat16)
    for kernel in ("dense", "math"):
        check_kernel(kernel, alibi, args)
        check_kernel(kernel, padding_mask, (*args, padding(2, 9, "none")))


@pytest.mark.parametrize("name", CHAINS)
def test_float64_stays_float64(name: str) -> None:
    q, k, v = (x.double() for x in make(2, (4, 4), (7, 7), (16, 8), torch.float32))
    check_kernel("math", CHAINS[name], (q, k, v, torch.randn(4, dtype=torch.float64)))


def test_every_kernel_declines_with_a_reason() -> None:
    """A target and a site that a kernel cannot run give a code and a sentence, never an exception."""
    sites = []
    functions: list[Callable[..., Tensor]] = [full, causal, *(masked(rule) for rule in RULES.values())]
    for function in functions:
        sites += raise_attention(function, make(*UNEQUAL[0], torch.float32)).sites
    for function in CHAINS.values():
        sites += raise_attention(function, (*make(2, (4, 4), (7, 7), (16, 16), torch.float32), torch.randn(4))).sites
    for target in (CPU, Target.parse("sm_90", devices())):
        for site in sites:
            answers = [kernel.supports(site, target) for kernel in all_kernels()]
            assert any(isinstance(answer, Supported) for answer in answers), site
            for answer in answers:
                assert isinstance(answer, Supported | Refusal)
                if isinstance(answer, Supported):
                    assert 0 < answer.seconds < 1
                else:
                    assert answer.code.startswith("EFF-A")
                    assert answer.reason
