"""Run attention over blocks of tokens in an order of their own: the kernel of block maps, behind one pass over q, k and v."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from effcompile.core.density import extent
from effcompile.core.kernel import Answer, SparseKernel
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target, element_bytes
from effcompile.lowering.attention.cpu_blocks import CpuBlocks
from effcompile.lowering.attention.triton_blocks import TritonBlocks


@dataclass(frozen=True)
class OrderedBlocks(SparseKernel):
    """Gather tokens, run the kernel of the device over the chosen blocks, and put the rows back."""

    name: ClassVar[str] = "ordered-blocks"
    op: ClassVar[str] = "eff::attention_ordered_v1"

    def supports(self, site: AttentionSite, target: Target, density: float) -> Answer:
        """Answer where the kernel of block maps runs the site; its time, and that of reading and writing all tokens twice."""
        kernel = CpuBlocks() if target.device.kind == "cpu" else TritonBlocks()
        answer = kernel.supports(site, target, density)
        if isinstance(answer, Refusal):
            return answer
        rows = extent(site.batch) * extent(site.heads) * extent(site.q_len)
        moved = 4.0 * rows * (site.head_dim + site.value_dim) * element_bytes(site.dtype)
        return replace(answer, seconds=answer.seconds + moved / target.device.memory_bandwidth)

    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Leave the op, which calls the kernel."""
        return node
