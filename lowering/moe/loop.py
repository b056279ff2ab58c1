"""Run one expert after the other, on any device: the body of `eff::moe_v1`.

It reads how many tokens each expert has on the host.
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
class Loop(ExpertDispatch):
    """Leave the op, whose body runs everywhere."""

    name: ClassVar[str] = "loop"

    def supports(self, site: MoESite, target: Target) -> Answer:
        """Answer for everything that the kernel of `fused` does not run."""
        if target.device.kind == "cpu" and site.dtype in ("float32", "bfloat16", "float16"):
            return Refusal("EFF-M204", "on CPU the op runs its kernel: `fused`")
        return price(self.name, site, target)

    def lower(self, node: fx.Node, site: MoESite, edit: Editor) -> fx.Node:
        """Return the node itself."""
        return node
