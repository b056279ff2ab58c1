"""Run attention over a run-time block map with 8-bit query-key products on a GPU, with the Triton kernels behind the op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from effcompile.core.kernel import Answer, SparseKernel, Supported
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.lowering.attention.triton_blocks import TritonBlocks
from effcompile.lowering.attention.triton_int8 import SHARE


@dataclass(frozen=True)
class TritonInt8Blocks(SparseKernel):
    """Round queries and keys, then run `codegen/triton/int8_blocks.py`; on CUDA tensors the op launches both."""

    name: ClassVar[str] = "triton-int8-blocks"
    op: ClassVar[str] = "eff::int8_blocks_v1"

    def supports(self, site: AttentionSite, target: Target, density: float) -> Answer:
        """Answer as the kernel of block maps does, in float16 and bfloat16."""
        answer = TritonBlocks().supports(site, target, density)
        if isinstance(answer, Supported) and site.dtype not in ("float16", "bfloat16"):
            return Refusal("EFF-A209", f"no kernel for {site.dtype} on {target.device.compute}")
        return Supported(SHARE * answer.seconds, answer.tag) if isinstance(answer, Supported) else answer

    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Leave the op: on CUDA tensors it launches the kernels."""
        return node
