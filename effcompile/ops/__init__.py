"""Define the `eff::` ops: dense meaning first, kernels elsewhere.

An op's plain PyTorch body is its meaning, its fake, its fallback and its oracle. `register()` is idempotent and is the only place
where ops enter torch's registry: the backend, the loader and the tests call it; importing this package does nothing. A version
is part of each name, because torch's caches know a custom op by name only.
"""

from __future__ import annotations

import importlib


def register() -> None:
    """Register every `eff::` op with torch, once."""
    from effcompile.ops import (
        attention,
        attention_blocks,
        attention_epilogue,
        attention_ordered,
        attention_span,
        attention_tokens,
        block_scores,
        block_sparse,
        blocks,
        codebook,
        column_scores,
        flash,
        int8_attention,
        int8_blocks,
        kv,
        linear,
        linear_rows,
        mask_tensor,
        moe,
        moe_capacity,
        moe_quantized,
        packing,
        paged_decode,
        tiled,
        unequal_experts,
        versatile_ffn,
    )
    from effcompile.ops.selectors import antidiagonal, clusters, pages, pooled, tail, topk, vertical_slash
    from effcompile.ops.tokens import mass

    selectors = (topk, pages, antidiagonal, pooled, vertical_slash, clusters, tail)
    with_kernels = (flash, block_sparse, paged_decode, block_scores, column_scores, int8_attention)
    plain = (
        attention,
        attention_blocks,
        attention_epilogue,
        attention_ordered,
        attention_span,
        attention_tokens,
        blocks,
        codebook,
        int8_blocks,
        kv,
        linear,
        linear_rows,
        mask_tensor,
        mass,
        moe,
        moe_capacity,
        moe_quantized,
        packing,
        tiled,
        unequal_experts,
        versatile_ffn,
    )
    for module in (*plain, *selectors, *with_kernels):
        module.register()
    # Kernels live above the ops, so their folder is named here and not imported; an op without a kernel is still whole.
    bodies = {name: body for module in with_kernels for name, body in module.BODIES.items()}
    kernels = importlib.import_module("effcompile.codegen.triton")
    caches = tuple(f"eff::kv_attention_{form}_v1" for form in ("token8", "grouped", "rows", "planes", "mixed"))
    experts = (moe.BLOCKS, moe_quantized.NAME)
    blocks_of = ("eff::attention_blocks_v1", "eff::attention_epilogue_v1", "eff::int8_blocks_v1")
    kernels.register(bodies, opaque=(*blocks_of, *caches, *experts))
