"""Compile stacks of layers that each call flex_attention: raised calls are outlined with their layer, kept ones stay right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effcompile as eff
from tests.support.flex import create_block_mask, debugging, flex_attention
from tests.support.small import CHEAP

LAYERS = 4


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


class Layer(nn.Module):
    def __init__(self, number: int, change: Callable[..., Any] | None) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.slope = nn.Parameter(torch.rand(2))
        self.number, self.change = number, change

    def forward(self, x: Tensor, blocks: Any) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        score = self.score if self.change is not None else None
        y = flex_attention(q, k, v, score, blocks)
        assert isinstance(y, Tensor)
        return x + self.out(y.transpose(1, 2).flatten(2))

    def score(self, s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert self.change is not None
        return self.change(self, s, h, i, j)  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Make one mask for all layers, or one a layer, or take it from outside."""

    def __init__(self, change: Callable[..., Any] | None = None, each: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(number, change) for number in range(LAYERS))
        self.each = each

    def forward(self, x: Tensor, given: Any = None) -> Tensor:
        length = x.shape[1]
        blocks = given
        for number, layer in enumerate(self.layers):
            if given is None and (self.each or number == 0):
                blocks = create_block_mask(causal, None, None, length, length, device="cpu")
            x = layer(x, blocks)
        return x


def alibi(layer: Layer, s: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + layer.slope[h] * (j - i)


def capped(layer: Layer, s: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.tanh(s / (layer.number + 1)) * (layer.number + 1)


def run(model: nn.Module, x: Tensor, *given: Any, **options: Any) -> tuple[str, list[str]]:
    """Compare with eager, and return the note about outlining and the masks of the sites."""
    with torch.no_grad():
        with debugging():
            expected = model(x, *given)
        fast = torch.compile(model, backend="eff", options={"strict": True, **options})
        with debugging():
            result = fast(x, *given)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    graph = eff.report()["graphs"][-1]
    (note,) = [n for n in graph["notes"] if n.startswith("outline")]
    assert len(graph["sites"]) + len(graph["missed"]) == LAYERS
    return note, [site["mask"] for site in graph["sites"]]


@pytest.mark.parametrize("each", [False, True])
def test_raised_layers_are_outlined(each: bool) -> None:
    note, masks = run(Stack(each=each), torch.randn(2, 50, 32), **CHEAP)
    assert note.startswith(f"outline-layers: {LAYERS} layers")
    assert masks == ["causal"] * LAYERS


def test_an_outlined_stack_through_inductor() -> None:
    note, masks = run(Stack(), torch.randn(2, 50, 32))
    assert note.startswith(f"outline-layers: {LAYERS} layers")
    assert masks == ["causal"] * LAYERS


def test_each_layer_keeps_its_own_score_function() -> None:
    note, masks = run(Stack(alibi), torch.randn(2, 50, 32), **CHEAP)
    assert masks == ["causal & bias(alibi)"] * LAYERS
    note, masks = run(Stack(capped), torch.randn(2, 50, 32), **CHEAP)
    assert masks == ["causal"] * LAYERS
    assert "no repeated layers" in note  # their softcaps differ


@pytest.mark.slow
def test_layers_whose_calls_stay() -> None:
    """The mask comes from outside and keeps less than its function says, which only a compiled call does."""
    model, x = Stack(), torch.randn(2, 256, 32)
    with debugging():
        blocks = create_block_mask(causal, None, None, 256, 256, device="cpu")
    blocks.full_kv_num_blocks.zero_()  # the second half no longer reads the first
    with torch.no_grad():
        result = torch.compile(model, backend="eff", options={"strict": True})(x, blocks)
        with debugging():
            halves = [model(part) for part in x.split(128, 1)]
    torch.testing.assert_close(result, torch.cat(halves, 1), rtol=1e-5, atol=1e-5)
    (graph,) = eff.report()["graphs"]
    assert [m["refusal"][:8] for m in graph["missed"]] == ["EFF-A108"] * LAYERS
    assert not graph["sites"]
