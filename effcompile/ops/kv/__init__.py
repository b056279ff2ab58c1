"""Define the ops of KV caches: append tokens in a compressed form, and attend over them without unpacking the cache.

Each format has an `eff::kv_append_*`, which writes the state in place, and an `eff::kv_attention_*`, which reads it; a `Storage`
(core/cache.py) calls both. Their PyTorch bodies are the meaning; on CPU `cpp/kv_attention.cpp` runs, which dequantizes in
registers, inside the two products of attention. New tokens are read by attention as the model gave them: only what was there
before them is read from the state, so that the prefill of an empty cache is exact.
"""

from __future__ import annotations


def register() -> None:
    """Register the ops of every form of cache, once."""
    from effcompile.ops.kv import evict, fixed, grouped, per_token, plain, two_plane

    for module in (plain, per_token, grouped, fixed, two_plane, evict):
        module.register()
