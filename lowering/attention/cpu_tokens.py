"""Run attention among kept tokens on CPU: they are gathered, and the kernel of block maps computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from effcompile.core.kernel import Answer, SparseKernel
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.lowering.attention import estimate
from effcompile.lowering.attention.cpu_blocks import runs_pairs


@dataclass(frozen=True)
class CpuTokens(SparseKernel):
    """Run any proved predicate among the tokens that the op keeps."""

    name: ClassVar[str] = "cpu-tokens"
    op: ClassVar[str] = "eff::attention_tokens_v1"

    def supports(self, site: AttentionSite, target: Target, density: float) -> Answer:
        """Answer as the kernel of block maps does."""
        if refusal := runs_pairs(site):
            return refusal
        if target.device.kind != "cpu":
            return Refusal("EFF-A205", "tokens are gathered on the host")
        return estimate.price_blocks(site, target, density)

    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Leave the op, which is its own kernel."""
        return node
