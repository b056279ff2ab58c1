"""Draw token ids, padding masks and caches for the calls of the matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCAB = 96
FIRST_TOKEN = 4  # 0 to 3 are special in some tokenizers: RoBERTa and OPT read positions off the padding id
STEPS = 3


def token_ids(batch: int, length: int, seed: int) -> Tensor:
    """Return ids `[batch, length]` that contain no special token."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TOKEN, VOCAB, (batch, length), generator=draw)


def values(*shape: int, seed: int) -> Tensor:
    """Return standard normal float32 values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padding(batch: int, length: int, seed: int, side: str) -> Tensor:
    """Return a ragged mask `[batch, length]`, 1 where a token stands; each row has at least one pad on `side`."""
    positions = torch.arange(length)
    rows = []
    for row in range(batch):
        pads = 1 + (2 * row + seed) % max(1, length // 2)
        rows.append(positions >= pads if side == "left" else positions < length - pads)
    return torch.stack(rows).long()


def grown(mask: Tensor, by: int) -> Tensor:
    """Return `mask` with `by` more tokens in every row."""
    return torch.cat([mask, mask.new_ones(mask.shape[0], by)], dim=1)


def dynamic_cache(config: Any, batch: int, longest: int) -> Any:
    """Return a transformers cache that grows by concatenation; its sliding layers keep their window."""
    from transformers import DynamicCache

    return DynamicCache(config=config)


def static_cache(config: Any, batch: int, longest: int) -> Any:
    """Return a transformers cache of fixed size, allocated before the first call as a compiled prefill needs it."""
    from transformers import StaticCache

    cache = StaticCache(config=config, max_cache_len=longest)
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, heads, width, torch.float32, torch.device("cpu"))
    return cache


def pair_cache(config: Any, batch: int, longest: int) -> Any:
    """Return the two caches of an encoder-decoder: its own tokens and the encoder's positions."""
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())
