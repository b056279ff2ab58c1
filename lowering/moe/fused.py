"""Run experts on CPU with the C++ kernel behind `eff::moe_v1`, for any number of tokens.

The kernel reads the weights of each expert that is hit once, in the model's own layout, and neither fetches weights nor sorts rows
into tensors of their own (ops/cpp/moe.cpp says how).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from effcompile.core.experts import ExpertDispatch, MoESite
from effcompile.core.kernel import Answer
from effcompile.core.rewrite import Editor
from effcompile.core.site import Refusal
from effcompile.core.target import Target
from effcompile.lowering.moe.price import price


@dataclass(frozen=True)
class Fused(ExpertDispatch):
    """Leave the op: on CPU tensors it runs the kernel."""

    name: ClassVar[str] = "fused"

    def supports(self, site: MoESite, target: Target) -> Answer:
        """Answer for CPUs and the dtypes of the kernel."""
        if target.device.kind != "cpu":
            return Refusal("EFF-M203", "the kernel runs on the host")
        if site.dtype not in ("float32", "bfloat16", "float16"):
            return Refusal("EFF-M204", f"the kernel has no {site.dtype}")
        return price(self.name, site, target)

    def lower(self, node: fx.Node, site: MoESite, edit: Editor) -> fx.Node:
        """Return the node itself."""
        return node
