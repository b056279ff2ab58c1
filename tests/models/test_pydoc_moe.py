"""Check the small trained mixture of experts: its weights predict text that training did not see, and its routing is learnt."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.models import zoo
from effcompile.models.mixtral import Mixtral
from effcompile.models.trained_pydoc_moe import WEIGHTS, config, held_out


def bits(model: torch.nn.Module, tokens: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())) / math.log(2)


def choices(model: torch.nn.Module, tokens: Tensor) -> list[Tensor]:
    """Return what each layer's router chose, `[T, k]`."""
    assert isinstance(model, Mixtral)
    found: list[Tensor] = []
    hooks = [layer.moe.router.register_forward_hook(lambda m, a, out: found.append(out[1])) for layer in model.layers]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return found


def test_the_weights_are_small_and_predict_text_that_training_did_not_see() -> None:
    assert WEIGHTS.stat().st_size <= 2_000_000
    model, tokens = zoo.load("pydoc-moe").model, held_out(8, 257)
    assert tokens.shape == (8, 257)
    assert len({tuple(row.tolist()) for row in tokens}) == 8
    trained = bits(model, tokens)
    assert trained < 2.7, "a byte at random takes 8 bits, by its frequency about 4.7"
    # Routing is part of what was learnt: another order of the experts is worse.
    for layer in model.layers:
        layer.moe.router.gate.weight.data = layer.moe.router.gate.weight.data.roll(1, 0)
    assert bits(model, tokens) > trained + 0.5


def test_half_precision_weights_cost_nothing_and_every_dtype_loads() -> None:
    tokens = held_out(2, 65)
    exact = bits(zoo.load("pydoc-moe", dtype=torch.float64).model, tokens)
    for dtype in (torch.float32, torch.bfloat16):
        assert abs(bits(zoo.load("pydoc-moe", dtype=dtype).model, tokens) - exact) < 0.05


def test_routing_is_uneven_and_every_expert_is_used() -> None:
    tokens = held_out(8, 256)
    for layer in choices(zoo.load("pydoc-moe").model, tokens):
        busy = torch.bincount(layer.flatten(), minlength=config().experts) / layer.numel()
        assert float(busy.max()) > 1.4 / config().experts, "as even as chance"
        assert float(busy.min()) > 0
