"""Show that in-place writes are honoured: a mask is what it holds when it is read, and nothing moves across a write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.recognize.test_near_misses import INF, B, D, H, S, above, qkv
from tests.support.check import check_idiom, check_kept, check_opaque, check_sites, raise_attention


def written(name: str) -> Callable[..., Tensor]:
    def scores_of(q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2)

    def product_sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scores_of(q, k)
        scores[..., 5:] = -INF
        return scores.softmax(-1) @ v

    def keys_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scores_of(q, k)
        k.zero_()
        return scores.softmax(-1) @ v

    def queries_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scores_of(q, k)
        q.view(-1)[3:].mul_(2)
        return scores.softmax(-1) @ v

    def mask_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = above()
        scores = scores_of(q, k).masked_fill(mask, -INF)
        mask[:, :] = False
        return scores.softmax(-1) @ v

    def probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        probs = scores_of(q, k).softmax(-1)
        first = probs.to(torch.float32)
        first[..., 0] = 0
        return first @ v

    return locals()[name]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["product_sliced", "keys_later", "queries_later", "mask_later", "probabilities"])
def test_a_write_between_the_products_stays(name: str) -> None:
    raised = raise_attention(written(name), qkv())
    assert not raised.sites
    assert raised.missed[0].refusal.code in ("EFF-A101", "EFF-A107")
    check_kept(written(name), qkv(), raised.missed[0].refusal.code)


def test_in_place_scaling_and_masking_is_attention() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2)
        scores.mul_(0.25)
        scores.masked_fill_(above(), -INF)
        return scores.softmax(-1) @ v

    check_idiom(attention, qkv(), mask="causal")


def test_a_mask_changed_between_two_attentions_is_read_twice() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(S, S, dtype=torch.bool).tril()
        first = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mask[:, 1] = True
        return first + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    raised = raise_attention(attention, qkv())
    assert [str(site.mask) for site in raised.sites] == ["causal", "((k == 1) | (k <= q))"]
    check_sites(attention, raised, qkv())


def test_a_stale_alias_is_not_the_mask() -> None:
    """A copy keeps what its source held; a view shows what is written later."""

    def copied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(S, S, dtype=torch.bool).triu()
        copy = mask.t().reshape(S * S)
        mask.fill_(True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=copy.reshape(S, S))

    def viewed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(S, S, dtype=torch.bool).tril()
        view = mask.view(1, S, S)
        mask[:, :3] = True
        return F.scaled_dot_product_attention(q, k, v, attn_mask=view)

    for function in (copied, viewed):
        raised = raise_attention(function, qkv())
        assert str(raised.sites[0].mask) != "full"
        check_sites(function, raised, qkv())


@pytest.mark.parametrize("name", ["split", "unbind", "transposed", "diagonal", "strided", "out"])
def test_a_write_that_has_no_rule_makes_the_mask_opaque(name: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(S, S, dtype=torch.bool).tril()
        if name == "split":
            mask.split(4, -1)[1].fill_(True)
        elif name == "unbind":
            mask.unbind(0)[2].fill_(True)
        elif name == "transposed":
            mask.t()[3].fill_(True)
        elif name == "diagonal":
            mask.diagonal(1).fill_(True)
        elif name == "strided":
            mask[::2].fill_(True)
        else:
            torch.ge(torch.arange(S)[None], torch.arange(S)[:, None], out=mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    check_opaque(attention, qkv())


def test_keys_written_after_they_were_repeated_are_not_read_through() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = [x[:, :, None].expand(B, 2, 2, S, D).reshape(B, H, S, D) for x in (k, v)]
        k.zero_()
        return F.scaled_dot_product_attention(q, *wide)

    raised = check_idiom(attention, qkv(2), idiom="sdpa")
    assert raised.sites[0].kv_heads == H
