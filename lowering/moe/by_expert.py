"""Leave the experts whole for ONNX, which has a form of them (lowering/onnx/moe.py): each expert on its own tokens."""

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
class ByExpert(ExpertDispatch):
    """Leave the op to the writer of ONNX."""

    name: ClassVar[str] = "by-expert"
    portable: ClassVar[bool] = True

    def supports(self, site: MoESite, target: Target) -> Answer:
        """Answer for ONNX alone: other runtimes have no loop whose sizes depend on data."""
        if target.backend != "onnx":
            return Refusal(
                "EFF-E115",
                "it is a form of ONNX, with a loop over experts whose tokens are counted at run time",
                "--to onnx, or --moe grouped",
            )
        return price(self.name, site, target)

    def lower(self, node: fx.Node, site: MoESite, edit: Editor) -> fx.Node:
        """Return the node itself."""
        return node
