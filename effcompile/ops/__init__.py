"""Define the `eff::` ops: dense meaning first, kernels elsewhere.

An op's plain PyTorch body is its meaning, its fake, its fallback and its oracle. `register()` is idempotent and is the only place
where ops enter torch's registry: the backend, the loader and the tests call it; importing this package does nothing. A version
is part of each name, because torch's caches know a custom op by name only.
"""

from __future__ import annotations


def register() -> None:
    """Register every `eff::` op with torch, once."""
    from effcompile.ops import attention, attention_blocks, blocks, linear, mask_tensor, packing

    attention.register()
    attention_blocks.register()
    blocks.register()
    linear.register()
    mask_tensor.register()
    packing.register()
