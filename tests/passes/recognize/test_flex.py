"""Raise calls of flex_attention, and leave alone those that ask for more than attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from effcompile.core.mask import Mask
from tests.support.flex import (
    INF,
    MASKS,
    B,
    D,
    H,
    S,
    causal,
    check_kept_call,
    check_raised,
    documents,
    flex_attention,
    masked,
    qkv,
    scored,
)


@pytest.mark.parametrize("name", ["causal", "window(19) & causal", "chunk(32) & causal", "full"])
def test_masks_made_in_the_same_graph(name: str) -> None:
    check_raised(masked(MASKS[name]), qkv(), name, scale=D**-0.5, heads=H, idiom="flex")


def test_no_block_mask() -> None:
    check_raised(scored(lambda s, b, h, i, j: s), qkv(), "full")
    check_raised(scored(lambda s, b, h, i, j: torch.where(i >= j, s, -INF)), qkv(7, 7), "causal")
    check_raised(scored(lambda s, b, h, i, j: s, scale=0.3), qkv(5, 9), "full", scale=0.3)


def test_captured_tensors_are_loads() -> None:
    def document(ids: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (ids[b, i] == ids[b, j]) & (i >= j)

    check_raised(masked(document, batch=B), (*qkv(), documents()), "document & causal")

    def padding(kept: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & kept[b, j]

    kept = torch.arange(S)[None] >= torch.tensor([[0], [140]])  # the second sequence has rows without keys
    raised = check_raised(masked(padding, batch=B), (*qkv(), kept), "causal & key-padding")
    assert isinstance(raised.sites[0].mask, Mask)
    assert raised.sites[0].mask.empty_row == "zero"

    def length(ends: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < ends[b]

    check_raised(masked(length, batch=B), (*qkv(), torch.tensor([150, 60])))


def test_a_captured_offset_moves_the_diagonal() -> None:
    def decoding(offset: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i + offset >= j

    check_raised(masked(decoding), (*qkv(1, 200), torch.tensor(120)))
    check_raised(masked(lambda b, h, i, j: i + 50 >= j), qkv(100, 150), "causal(offset=50)")


def test_heads_that_mask_differently() -> None:
    def local(wide: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (wide[h] | (i - j < 30))

    check_raised(masked(local, heads=H), (*qkv(), torch.tensor([True, False, True, False])))


def test_grouped_heads_and_other_dtypes() -> None:
    check_raised(masked(causal), qkv(heads=2), "causal", kv_heads=2)
    check_raised(scored(lambda s, b, h, i, j: torch.where(i >= j, s, -INF)), qkv(heads=1), "causal", kv_heads=1)
    check_raised(masked(causal), qkv(dtype=torch.bfloat16), "causal", dtype="bfloat16")
    soft = masked(causal, score=lambda s, b, h, i, j: torch.tanh(s / 2) * 2)
    check_raised(soft, qkv(9, 9, dtype=torch.bfloat16), "causal", softcap=2.0)
    below = scored(lambda s, b, h, i, j: torch.where(i > j, s, -INF))
    check_raised(below, qkv(9, 9, dtype=torch.float64), dtype="float64")


def test_repeated_heads_are_looked_through() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for x in (k, v))
        return masked(causal)(q, k, v)

    check_raised(call, qkv(heads=2), "causal", kv_heads=2, idiom="flex+repeat_kv")


@pytest.mark.parametrize(
    ("contiguous", "dynamic"),
    [
        (False, False),
        (True, True),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
def test_the_layout_of_the_result_is_kept_for_those_who_can_tell(contiguous: bool, dynamic: bool) -> None:
    def view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = masked(causal, score=lambda s, b, h, i, j: torch.tanh(s))(q, k, v)
        return out.view(B, H, -1) if contiguous else out.transpose(1, 2).view(B, -1, H * D)

    def strided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = scored(lambda s, b, h, i, j: torch.where(j > i, s, -1e9))(q, k, v)
        return out.as_strided((B, 7, 5), (S * H * D, 3, 1))

    given = [x.contiguous() if contiguous else x for x in qkv()]
    check_raised(view, given, "causal", dynamic=dynamic)
    check_raised(strided, given, dynamic=dynamic)
    raised = check_raised(masked(causal), given, "causal", dynamic=dynamic)
    if not dynamic:  # else the graph has sizes among its inputs
        assert raised.run(*given)[0].stride() == given[0].stride()  # what is returned


def test_symbolic_lengths() -> None:
    check_raised(masked(MASKS["window(19) & causal"]), qkv(), "window(19) & causal", dynamic=True)
    check_raised(scored(lambda s, b, h, i, j: torch.where(i >= j, s, -INF)), qkv(), "causal", dynamic=True)

    def last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        moved = k.shape[2] - q.shape[2]
        return masked(lambda b, h, i, j: i + moved >= j)(q, k, v)

    check_raised(last, qkv(100, 150), dynamic=True)


def test_more_than_the_result_is_asked_for() -> None:
    def lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
        return out, aux.lse

    check_kept_call(lse, qkv(), "EFF-A109", "LSE")
    check_kept_call(lambda *given: lse(*given)[1], qkv(), "EFF-A109", "LSE")  # and nothing else
    call = scored(lambda s, b, h, i, j: s, kernel_options={"PRESCALE_QK": True})
    check_kept_call(call, qkv(), "EFF-A109", "PRESCALE_QK")
    one = qkv()[1][:1]
    broadcast = masked(causal, batch=B)
    check_kept_call(lambda q, k, v: broadcast(q, k, v), (qkv()[0], one, one), "EFF-A105", "broadcast")


def test_captured_data_that_is_written_in_place() -> None:
    def same_document(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return masked(lambda b, h, i, j: ids[b, i] == ids[b, j], batch=B)(q, k, v)

    def after(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        out = same_document(q, k, v, ids)
        ids.add_(1)
        return out

    check_kept_call(after, (*qkv(), documents()), "EFF-A103", "written in place after the mask read it")

    def copied(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        mine = ids.clone()
        out = same_document(q, k, v, mine)
        mine.mul_(0)
        return out + mine.sum()

    check_raised(copied, (*qkv(), documents()), "document")
