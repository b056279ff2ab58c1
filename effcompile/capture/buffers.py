"""Keep a decoder's cache in buffers of a fixed capacity that belong to the caller: a call writes its tokens into them.

Keys and values are `[batch, heads, capacity, width]`. How many tokens are there is what the attention mask, which covers them and
those of the call, has more than the call. A runtime that gets one piece of memory as input and as output writes only what is new.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _layer() -> Any:
    """Return the class of a cache layer; it is made here, since importing this module imports no transformers."""
    from transformers.cache_utils import DynamicLayer

    class Buffered(DynamicLayer):  # type: ignore[misc]
        """Write tokens into a buffer behind those that are there; attention reads both and nothing further on."""

        def __init__(self, keys: Tensor, values: Tensor, past: Any) -> None:
            super().__init__()
            self.lazy_initialization(keys, values)
            self.keys, self.values, self.past = keys, values, past

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Write the tokens of a call; return keys and values of all that are there now."""
            total = self.past + key_states.shape[2]
            self.keys, self.values = (
                torch.slice_scatter(held, new, 2, self.past, total)
                for held, new in ((self.keys, key_states), (self.values, value_states))
            )
            return self.keys[:, :, :total], self.values[:, :, :total]

        def get_seq_length(self) -> int:
            """Return how many tokens were there before this call."""
            return int(self.past) if isinstance(self.past, int) else self.past

    return Buffered


def layer_of(keys: Tensor, values: Tensor, past: Any) -> Any:
    """Return a cache layer over buffers that hold `past` tokens."""
    return _layer()(keys, values, past)
