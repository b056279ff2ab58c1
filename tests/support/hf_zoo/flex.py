"""Let transformers models call flex_attention in the graph that Dynamo gives, and SDPA where nothing compiles them.

transformers' own way makes the BlockMask in front of a graph break (it warns), and compiles each eager call. Here the mask is part
of the graph, and the eager run is an oracle that shares no code with FlexAttention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.hf_zoo.weights import hugging_face

NAME = "flex_in_graph"


def flex(config: str, model: str, **fields: Any) -> Callable[[], nn.Module]:
    """Return a builder of a transformers model as `hugging_face` does, whose attention is a flex_attention call."""

    def build() -> nn.Module:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, _mask)
        return hugging_face(config, model, attn_implementation=NAME, **fields)()

    return build


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float | None = None, **fields: Any
) -> tuple[Tensor, None]:
    if not torch.compiler.is_compiling():
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **fields)
    from torch.nn.attention.flex_attention import flex_attention

    out = flex_attention(q, k, v, block_mask=mask, scale=scaling, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    **fields: Any,
) -> Any:
    from transformers import masking_utils as made

    if not torch.compiler.is_compiling():
        fields["allow_is_causal_skip"] = False
        places = (batch_size, q_length, kv_length, q_offset, kv_offset)
        return made.sdpa_mask(*places, mask_function, attention_mask, device=device, **fields)
    from torch.nn.attention.flex_attention import create_block_mask

    if attention_mask is not None:
        padding = made.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        mask_function = made.and_masks(mask_function, made.padding_mask_function(padding))
    mask_function = made.add_offsets_to_mask_function(mask_function, q_offset, kv_offset)
    return create_block_mask(mask_function, batch_size, None, q_length, kv_length, device=device)
