"""Take a layer of the zoo's trained mixture of experts, and what it gets for real text: routing that training made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

LAYER = 1


def config() -> SimpleNamespace:
    """Return the sizes of the layer, by the names that transformers has for them."""
    from effcompile.models.trained_pydoc_moe import config as sizes

    found = sizes()
    return SimpleNamespace(
        hidden_size=found.llama.width,
        intermediate_size=found.llama.hidden,
        num_local_experts=found.experts,
        num_experts_per_tok=found.top_k,
    )


def block() -> nn.Module:
    """Return the layer as transformers' Mixtral block, with the trained weights in float32."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    made: nn.Module = MixtralSparseMoeBlock(MixtralConfig(**vars(config())))
    layer = _model().layers[LAYER].moe
    pairs = (
        (made.gate.weight, layer.router.gate.weight),
        (made.experts.gate_up_proj, layer.experts.gate_up),
        (made.experts.down_proj, layer.experts.down),
    )
    with torch.no_grad():
        for mine, theirs in pairs:
            assert mine.shape == theirs.shape
            mine.copy_(theirs)
    return made


def inputs(tokens: int, count: int) -> list[Tensor]:
    """Return what the layer gets for text that training did not see: `count` tensors `[1, T, H]`, one behind the other."""
    from effcompile.models.trained_pydoc_moe import held_out

    model = _model()
    length = 512
    text = held_out(-(-tokens * count // length), length)
    found: list[Tensor] = []
    hook = model.layers[LAYER].moe.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        model(text)
    hook.remove()
    rows = found[0].reshape(-1, found[0].shape[-1])
    return [rows[n * tokens : (n + 1) * tokens][None].clone() for n in range(count)]


def _model() -> Any:
    from effcompile.models.trained_pydoc_moe import build

    return build(torch.float32, meta=False).eval()
