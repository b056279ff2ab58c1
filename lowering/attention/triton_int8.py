"""Run attention with 8-bit query-key products on a GPU, with the Triton kernel behind the op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from effcompile.core.kernel import Answer, SparseKernel, Supported
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.lowering.attention import estimate
from effcompile.lowering.attention.triton_blocks import tuned

SHARE = 0.75
"""Time against products of 16 bits: half of the work, the product with the keys, at twice the rate."""


@dataclass(frozen=True)
class TritonInt8(SparseKernel):
    """Round queries and keys, then run the kernel of `codegen/triton/int8.py`; on CUDA tensors the op launches both."""

    name: ClassVar[str] = "triton-int8"
    op: ClassVar[str] = "eff::int8_attention_v1"

    def supports(self, site: AttentionSite, target: Target, density: float) -> Answer:
        """Answer for GPUs of sm_80 and later and CDNA 3 and 4, in float16 and bfloat16, head dimensions to 256."""
        if target.device.kind == "cpu":
            return Refusal("EFF-A209", "the kernel is for GPUs")
        if site.dtype not in ("float16", "bfloat16") or not tuned(target.device.compute):
            return Refusal("EFF-A209", f"no kernel for {site.dtype} on {target.device.compute}")
        if max(site.head_dim, site.value_dim) > 256:
            return Refusal("EFF-A210", f"head dimensions {site.head_dim} and {site.value_dim}")
        visited = estimate.density(site, (128, 64))
        return Supported(SHARE * estimate.seconds("sdpa-causal", site, target, visited))

    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Leave the op: on CUDA tensors it launches the kernels."""
        return node
