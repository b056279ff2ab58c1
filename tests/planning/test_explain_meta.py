"""Explain models on the meta device: what has no content there is unknown, and is never read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effcompile as eff
from tests.support.check import raise_attention
from tests.support.flex import causal, create_block_mask, debugging, flex_attention

WIDTH, HEADS, LENGTH, LONGEST = 32, 2, 20, 64
INF = float("inf")


class Written(nn.Module):
    """Attend as GPT-2 does: a triangle that the module holds, as a buffer or as a plain attribute."""

    def __init__(self, kind: str = "buffer", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        lower = torch.tril(torch.ones(LONGEST, LONGEST, dtype=dtype)).view(1, 1, LONGEST, LONGEST)
        if kind == "buffer":
            self.register_buffer("lower", lower)
        else:
            self.lower = lower
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        kept = self.lower[:, :, : x.shape[1], : x.shape[1]]
        return scores.masked_fill(kept == 0, -INF).softmax(-1) @ v


class Called(nn.Module):
    """Attend through flex_attention, with a mask that is made in the call or held."""

    def __init__(self, held: bool) -> None:
        super().__init__()
        self.qkv, self.held = nn.Linear(WIDTH, 3 * WIDTH), None
        if held:
            with debugging():
                self.held = self.blocks(LENGTH, torch.get_default_device())

    def blocks(self, length: int, device: Any) -> Any:
        return create_block_mask(causal, None, None, length, length, device=device)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        blocks = self.held if self.held is not None else self.blocks(x.shape[1], x.device)
        found = flex_attention(q, k, v, block_mask=blocks)
        assert isinstance(found, Tensor)
        return found


def example(device: str = "cpu") -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
@pytest.mark.parametrize("inputs", ["cpu", "meta"])
def test_a_triangle_on_meta_is_unknown(dtype: torch.dtype, inputs: str) -> None:
    found = eff.explain(Written(dtype=dtype).to("meta"), example(inputs), target="cpu")
    (row,) = found.sites
    assert not found.stop
    assert "no content on the meta device" in str(row.site.mask)
    assert "no content on the meta device" in str(found)


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_a_triangle_with_content_is_read(kind: str) -> None:
    (row,) = eff.explain(Written(kind), example(), target="cpu").sites
    assert str(row.site.mask) == "causal"
    (row,) = eff.explain(Written(kind), example(), target="cpu", real=True).sites
    assert str(row.site.mask) == "causal"


def test_recognition_itself_reads_no_meta_buffer() -> None:
    q = torch.randn(2, HEADS, 8, 16, device="meta")

    def attention(q: Tensor, lower: Tensor) -> Tensor:
        return (q @ q.transpose(-1, -2)).masked_fill(lower == 0, -INF).softmax(-1) @ q

    raised = raise_attention(attention, (q, torch.ones(8, 8, device="meta").tril()), buffers=(1,))
    (site,) = raised.sites
    assert "no content on the meta device" in str(site.mask)
    assert not raised.found.pinned


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_flex_call_whose_mask_is_made_in_the_call(place: str) -> None:
    with torch.device(place):
        model = Called(held=False)
    found = eff.explain(model, example(place), target="sm_90")
    (row,) = found.sites
    assert (str(row.site.mask), row.site.idiom, row.kernel) == ("causal", "flex", "sdpa-causal")
    assert not found.not_rewritten


def test_a_held_block_mask_is_compared_where_it_has_content() -> None:
    model = Called(held=True)
    for real in (False, True):
        (row,) = eff.explain(model, example(), target="sm_90", real=real).sites
        assert str(row.site.mask) == "causal"


def test_a_held_block_mask_on_meta_is_unknown() -> None:
    with torch.device("meta"):
        model = Called(held=True)
    found = eff.explain(model, example("meta"), target="sm_90")
    assert not found.sites
    assert not found.stop
    text = str(found)
    assert "EFF-A108" in text
    assert "no content on the meta device" in text
