"""Show graphs that look like attention, or like a mask, and are not: each stays as it is, or keeps its mask as data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.core.mask import Mask
from tests.support.check import check_idiom, check_kept, check_opaque, check_sites, raise_attention

B, H, S, D = 2, 4, 8, 16
INF = float("inf")


def qkv(heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    make = lambda n: torch.randn(B, n, S, D, generator=generator)  # noqa: E731
    return make(H), make(heads), make(heads)


def above() -> Tensor:
    """Return the future: True where the key comes after the query."""
    return torch.arange(S)[None] > torch.arange(S)[:, None]


def chain(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return attention written out, with `step` from scores to probabilities."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return step(torch.matmul(q, k.transpose(-1, -2)) * D**-0.5, *more) @ v

    return attention


# --- the softmax chain ---


@pytest.mark.parametrize(
    ("code", "step"),
    [
        (None, lambda s: s.softmax(-2)),
        (None, lambda s: s.log_softmax(-1)),
        (None, lambda s: torch.ops.aten._safe_softmax(s.masked_fill(above(), -INF), -1)),
        ("EFF-A104", lambda s: ((s + above().float()) * 0.5).softmax(-1)),
        ("EFF-A104", lambda s: (s.masked_fill(above(), -INF) * -1.0).softmax(-1)),
        ("EFF-A104", lambda s: (torch.tanh((s + above().float()) / 30.0) * 30.0).softmax(-1)),
        ("EFF-A106", lambda s: (torch.tanh(s / 30.0) * 20.0).softmax(-1)),
        ("EFF-A106", lambda s: torch.tanh(s).softmax(-1)),
        ("EFF-A106", lambda s: s.masked_fill(above(), 0.0).softmax(-1)),
        ("EFF-A106", lambda s: s.masked_fill(above(), -3.0).softmax(-1)),
        ("EFF-A106", lambda s: s.masked_fill(above(), -1e4).softmax(-1)),
        ("EFF-A106", lambda s: s.masked_fill(above(), INF).softmax(-1)),
        ("EFF-A106", lambda s: (s.masked_fill(above(), -1e9) * 1e-6).softmax(-1)),
        ("EFF-A106", lambda s: torch.where(above(), s, s * 2.0).softmax(-1)),
        ("EFF-A106", lambda s: torch.add(s, above().float(), alpha=3.0).softmax(-1)),
        ("EFF-A106", lambda s: torch.div(s, 0.5, rounding_mode="floor").softmax(-1)),
        ("EFF-A106", lambda s: (s - s.amax(-2, keepdim=True)).softmax(-1)),
        ("EFF-A106", lambda s: (s - s.mean(-1, keepdim=True)).softmax(-1)),
        ("EFF-A105", lambda s: s.view(H, B, S, S).softmax(-1).view(B, H, S, S)),
        ("EFF-A101", lambda s: s.softmax(-1).masked_fill(above(), 0.0)),
        ("EFF-A101", lambda s: s.softmax(-1) * above()),
        ("EFF-A101", lambda s: s.softmax(-1).transpose(-1, -2)),
        ("EFF-A101", lambda s: s.softmax(-1).softmax(-1)),
    ],
)
def test_a_step_that_is_not_attention_stays(code: str | None, step: Callable[..., Tensor]) -> None:
    check_kept(chain(step), qkv(), code)


def test_a_negative_scale_turns_the_queries_around() -> None:
    """SDPA scales the -inf of its own causal mask too, so a negative scale goes to the queries."""
    raised = check_idiom(chain(lambda s: (s * -0.5).masked_fill(above(), -INF).softmax(-1)), qkv(), mask="causal")
    assert raised.sites[0].scale == 0.5 * D**-0.5
    check_idiom(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, ~above(), scale=-0.5), qkv(), mask="causal")
    check_kept(chain(lambda s: (s * 0.0).masked_fill(above(), -INF).softmax(-1)), qkv(), "EFF-A106", "scale is 0")


def test_probabilities_that_are_returned_stay() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        probs = (q @ k.transpose(-1, -2)).softmax(-1)
        return probs @ v, probs

    check_kept(attention, qkv(), "EFF-A101", "output_attentions")


def test_scores_that_are_returned_are_no_obstacle() -> None:
    """The product itself may have other readers: it is computed for them as before."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-1, -2)
        return scores.softmax(-1) @ v, scores

    check_idiom(attention, qkv(), mask="full")


def test_scaled_scores_that_are_returned_stay() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-1, -2) * 0.5
        return scores.softmax(-1) @ v, scores

    check_kept(attention, qkv(), "EFF-A101")


def test_active_dropout_stays() -> None:
    """Dropout draws random numbers, so the graphs are compared and not their results."""

    def chained(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.5, True) @ v

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    for function in (chained, fused):
        raised = raise_attention(function, qkv())
        assert not raised.sites
        assert [missed.refusal.code for missed in raised.missed] == ["EFF-A102"]


def test_a_product_with_a_weight_is_no_attention() -> None:
    """Softmax between two linear layers has the shape of attention; only activations make queries and keys."""

    def gate(x: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return (x @ w).softmax(-1) @ u

    raised = raise_attention(gate, (torch.randn(B, S, D), torch.randn(D, 5), torch.randn(5, D)))
    assert not raised.sites
    assert not raised.missed


def test_scores_without_gradient_stay() -> None:
    """Raising would let gradients flow to queries and keys."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).detach().softmax(-1) @ v

    assert not raise_attention(attention, qkv()).sites


# --- grouped heads and broadcasting ---


def repeated(name: str) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def wide(x: Tensor) -> Tensor:
            if name == "tiled":
                return x[:, None].expand(B, 2, 2, S, D).reshape(B, H, S, D)
            if name == "repeated whole":
                return x.repeat(1, 2, 1, 1)
            if name == "batch":
                return x[:1, :, None].expand(B, 2, 2, S, D).reshape(B, H, S, D)
            if name == "mixed":
                return x.transpose(-1, -2)[:, :, None].expand(B, 2, 2, D, S).reshape(B, H, S, D)
            assert name == "keys only"
            return x

        k = k.repeat_interleave(2, 1) if name == "keys only" else wide(k)
        v = v.repeat(1, 2, 1, 1) if name == "keys only" else wide(v)
        return F.scaled_dot_product_attention(q, k, v)

    return attention


@pytest.mark.parametrize("name", ["tiled", "repeated whole", "batch", "mixed", "keys only"])
def test_another_layout_of_heads_is_not_grouped(name: str) -> None:
    raised = check_idiom(repeated(name), qkv(2), idiom="sdpa")
    assert raised.sites[0].kv_heads == H


@pytest.mark.parametrize("which", ["q", "k", "v", "kv"])
def test_operands_that_broadcast_stay(which: str) -> None:
    q, k, v = qkv()
    given = [x[:1] if name in which else x for name, x in zip("qkv", (q, k, v))]
    check_kept(F.scaled_dot_product_attention, given, "EFF-A105")
    check_kept(chain(lambda s: s.softmax(-1)), given, "EFF-A105")


@pytest.mark.parametrize(("k_heads", "v_heads"), [(1, H), (H, 1)])
def test_heads_that_broadcast_on_one_side_stay(k_heads: int, v_heads: int) -> None:
    q, k, v = qkv()
    check_kept(chain(lambda s: s.softmax(-1)), (q, k[:, :k_heads], v[:, :v_heads]), "EFF-A105")


def test_one_key_head_for_all_is_grouped() -> None:
    check_idiom(chain(lambda s: s.softmax(-1)), qkv(1), mask="full")


# --- masks ---


def test_minus_one_hundred_is_an_addend() -> None:
    """Swin separates windows by -100: a score can overcome it."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = torch.arange(S) // 4
        mask = torch.zeros(S, S).masked_fill(window[:, None] != window[None], -100.0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    raised = check_idiom(attention, qkv())
    mask = raised.sites[0].mask
    assert isinstance(mask, Mask)
    assert str(mask.keep) == "True"
    (call,) = raised.calls(*qkv())
    assert call.mask is not None
    assert torch.equal(call.grid(call.bias), call.mask.expand(call.extents))


def test_several_addends_are_all_kept() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.where(above(), -INF, torch.where(torch.arange(S)[None] < 3, 2.5, -1.0))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    check_idiom(attention, qkv())


def test_an_inverted_mask_is_inverted() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=above() | (torch.arange(S)[None] == 0))

    check_idiom(attention, qkv(), mask="((q <= (k + -1)) | (k == 0))")


def test_data_over_queries_and_keys_is_opaque() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    check_opaque(attention, (*qkv(), torch.ones(S, S, dtype=torch.bool).tril()), "data over query and key positions")


def test_two_attentions_of_other_lengths_do_not_share_a_mask() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(S, S, dtype=torch.bool).tril()
        half = mask[4:]
        first = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return torch.cat([first, F.scaled_dot_product_attention(q[:, :, 4:], k, v, attn_mask=half)], 2)

    raised = raise_attention(attention, qkv())
    assert [str(site.mask) for site in raised.sites] == ["causal", "causal(offset=4)"]
    check_sites(attention, raised, qkv())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_narrow_integers_wrap_around_and_are_not_read(dtype: torch.dtype) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(S, dtype=dtype) * 40
        return F.scaled_dot_product_attention(q, k, v, attn_mask=places[None] <= places[:, None] + 100)

    check_opaque(attention, qkv())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_a_triangle_with_one_wrong_element_is_not_causal(dtype: torch.dtype) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = torch.where(bias[:, :, :S, :S].to(torch.bool), q @ k.transpose(-1, -2), torch.finfo(q.dtype).min)
        return scores.softmax(-1) @ v

    triangle = torch.ones(1, 1, 16, 16).tril().to(dtype)
    check_idiom(attention, (*qkv(), triangle), mask="causal", buffers=[3])
    for place in ((0, 0, 2, 5), (0, 0, 15, 0), (0, 0, 3, 3)):
        wrong = triangle.clone()
        wrong[place] = 1 - wrong[place].int()
        check_opaque(attention, (*qkv(), wrong), buffers=[3])


def test_a_triangle_that_is_no_buffer_is_data() -> None:
    """An input may change from call to call; only a buffer is watched."""

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, :, :S, :S])

    check_opaque(attention, (*qkv(), torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()))


def test_a_running_sum_of_something_that_varies_is_data() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = torch.arange(S).cumsum(0)[3]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(torch.arange(S) < end)[None].expand(S, S))

    raised = check_idiom(attention, qkv())
    (call,) = raised.calls(*qkv())
    assert call.grid(call.keep)[0, 0, 0].tolist() == [place < 6 for place in range(S)]


def test_a_small_fill_shows_through_rows_that_it_fills() -> None:
    """Added to a whole row, -1e9 leaves scores above 32 visible in float32: such a mask is not a mean over the row."""

    def attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        mask = torch.zeros(B, 1, 1, S).masked_fill(~kept[:, None, None], -1e9)
        return F.scaled_dot_product_attention(q * 60, k, v, attn_mask=mask)

    kept = torch.ones(B, S, dtype=torch.bool)
    kept[0] = False
    check_opaque(attention, (*qkv(), kept), "-1e+09")
