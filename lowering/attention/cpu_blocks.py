"""Run attention over a run-time block map on CPU, with the C++ kernel behind the op.

Measured on two Zen 4 cores at 8,192 tokens, 9 query and 3 key heads of dimension 64, causal, 10 % of the pairs kept in blocks of
128 (bench/results/amd-x86-64-avx512+bf16/sparse-attention.json, times over torch's SDPA with is_causal, float32 / bfloat16): this
kernel 10.0 / 13.7, with the selector of block-topk 9.2 / 11.7; gathering the keys of each block of queries and multiplying with
torch 2.0 / 2.1. At 2,048 tokens the blocks that always stay are 18 % of the pairs, and the selector weighs more: 3.7 / 4.3 in all.
What made the kernel: sums of a tile of scores in bare registers (arrays of at::vec's class went through memory, at half the rate
in float32), 256 columns of scores at a time, dot-product instructions for bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from effcompile.core.expr import TRUE
from effcompile.core.kernel import Answer, SparseKernel
from effcompile.core.mask import Mask
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.lowering.attention import estimate


@dataclass(frozen=True)
class CpuBlocks(SparseKernel):
    """Run the chosen blocks of any proved predicate."""

    name: ClassVar[str] = "cpu-blocks"
    op: ClassVar[str] = "eff::attention_blocks_v1"

    def supports(self, site: AttentionSite, target: Target, density: float) -> Answer:
        """Answer for proved masks without a score addend, softcap or sink logits."""
        if refusal := runs_pairs(site):
            return refusal
        if target.device.kind != "cpu":
            return Refusal("EFF-A205", "the kernel runs on the host")
        return estimate.price_blocks(site, target, density)

    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Leave the op: on CPU tensors it runs the kernel."""
        return node


def runs_pairs(site: AttentionSite) -> Refusal | None:
    """Return why attention over chosen pairs cannot run a site, else None."""
    if site.softcap:
        return Refusal("EFF-A201", "attention over block maps has no softcap")
    if site.sinks:
        return Refusal("EFF-A202", "attention over block maps has no sink logits")
    mask = site.mask
    if not isinstance(mask, Mask):
        return Refusal("EFF-A103", f"the mask is opaque: {mask.reason}")
    if mask.bias is not None:
        return Refusal("EFF-A207", "it has no score addend")
    if mask.empty_row == "nan" or (mask.empty_row == "uniform" and mask.soft != TRUE):
        return Refusal("EFF-A204", "its rule for rows without keys is not one of this kernel's")
    return None
