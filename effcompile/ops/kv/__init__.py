"""Define the ops of KV caches: append tokens in a compressed form, and attend over them without unpacking the cache.

Each format has an `eff::kv_append_*`, which writes the state in place, and an `eff::kv_attention_*`, which reads it; a `Storage`
(core/cache.py) calls both. Their PyTorch bodies are the meaning; on CPU `cpp/kv_attention.cpp` runs, which dequantizes in
registers, inside the two products of attention. New tokens are read by attention as the model gave them: only what was there
before them is read from the state, so that the prefill of an empty cache is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def register() -> None:
    """Register the ops of every form of cache, once."""
    from effcompile.ops.kv import (
        evict,
        fixed,
        grouped,
        latent,
        mixed,
        per_token,
        plain,
        refuse,
        ring,
        seek,
        tokens,
        two_plane,
        window,
    )

    for module in (
        plain,
        per_token,
        grouped,
        fixed,
        two_plane,
        mixed,
        latent,
        tokens,
        evict,
        seek,
        ring,
        refuse,
        window,
    ):
        module.register()


def places(tensors: Mapping[str, Tensor]) -> Any:
    """Return how many tokens the operands of an attention over a cache have place for; a symbol where that is one."""
    if "keys" in tensors:
        return tensors["keys"].shape[2]
    if "latents" in tensors:
        return tensors["latents"].shape[2]
    if "a_positions" in tensors:
        return sum(tensors[name].shape[2] for name in ("a_positions", "b_positions", "k_recent"))
    scales = tensors["v_scales"]
    return tensors["k_codes"].shape[2] if scales.dim() == 2 else scales.shape[-1]
