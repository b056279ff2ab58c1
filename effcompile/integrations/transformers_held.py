"""Stand for the keys of a compressed cache where a model handles them: between `Cache.update` and the attention interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.runtime.kv_cache import LayerCache


class Held:
    """Stand for the keys of a cache between the cache and the attention that reads it."""

    def __init__(self, layer: LayerCache, keys: Tensor) -> None:
        self.layer, self.keys = layer, keys

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the new keys."""
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the new keys."""
        return self.keys.device

    def __getattr__(self, name: str) -> Any:
        raise EffError(
            "EFF-K205",
            f"this model's attention asks the keys of a compressed cache for `{name}`, which exist in packed form only",
            hint="eff.prepare(model, kv=...) on the model that the cache is passed to; its attention must go through transformers' "
            "AttentionInterface",
        )
