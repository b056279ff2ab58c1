"""Run attention over a run-time block map on a GPU, with the Triton kernel behind the op.

The op is its own kernel: on CUDA tensors it launches `codegen/triton/attention_blocks.py`, and TorchInductor does not look into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from effcompile.core.expr import TRUE
from effcompile.core.expr_eval import to_json
from effcompile.core.kernel import Answer, SparseKernel, Supported
from effcompile.core.mask import Mask
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.lowering.attention import estimate
from effcompile.ops.row_limits import split_limits


@dataclass(frozen=True)
class TritonBlocks(SparseKernel):
    """Run the chosen blocks of masks that are a range of keys for each row and a set of keys."""

    name: ClassVar[str] = "triton-blocks"
    op: ClassVar[str] = "eff::attention_blocks_v1"

    def supports(self, site: AttentionSite, target: Target, density: float) -> Answer:
        """Answer for GPUs of sm_80 and later and CDNA 3 and 4, in float16, bfloat16 and float32, head dimensions to 256."""
        if target.device.kind == "cpu":
            return Refusal("EFF-A209", "the kernel is for GPUs")
        if not isinstance(site.mask, Mask):
            return Refusal("EFF-A103", f"the mask is opaque: {site.mask.reason}")
        if site.softcap:
            return Refusal("EFF-A201", "attention over block maps has no softcap")
        if site.sinks:
            return Refusal("EFF-A202", "attention over block maps has no sink logits")
        if site.mask.bias is not None:
            return Refusal("EFF-A207", "attention over block maps has no score addend")
        if site.dtype not in ("float16", "bfloat16", "float32") or not tuned(target.device.compute):
            return Refusal("EFF-A209", f"no kernel for {site.dtype} on {target.device.compute}")
        if max(site.head_dim, site.value_dim) > 256:
            return Refusal("EFF-A210", f"head dimensions {site.head_dim} and {site.value_dim}")
        if split_limits(to_json(site.mask.keep)).rest != TRUE:
            return Refusal("EFF-A203", "the mask tells apart heads, or single pairs within a row's range of keys")
        # Priced as the other block-skipping kernel is: neither has been measured on a GPU.
        visited = density * estimate.density(site, (128, 128))
        return Supported(estimate.seconds("flex", site, target, visited))

    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Leave the op: on CUDA tensors it launches the kernel."""
        return node


def tuned(compute: str) -> bool:
    """Tell whether the Triton kernels have configs for a chip."""
    return compute.startswith(("sm_8", "sm_9", "sm_10", "sm_12")) or compute in ("gfx942", "gfx950")
