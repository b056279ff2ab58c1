"""Read the operands of an `eff::attention_v1` node by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from effcompile.core.expr import Expr
from effcompile.core.expr_eval import from_json


@dataclass(frozen=True)
class AttentionCall:
    """Hold the operands; `keep` and `bias` are expressions over `loads` and `sizes`, None where the mask is opaque."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    sinks: fx.Node | None
    loads: tuple[fx.Node, ...]
    sizes: tuple[fx.Node | int, ...]
    keep: Expr | None
    bias: Expr | None
    soft: Expr | None
    empty_row: str
    scale: float
    softcap: float

    @classmethod
    def of(cls, node: fx.Node) -> AttentionCall:
        """Unpack a node."""
        q, k, v, mask, sinks, loads, sizes, keep, bias, soft, empty, scale, cap = node.args
        operands: dict[str, Any] = {"q": q, "k": k, "v": v, "mask": mask, "sinks": sinks}
        operands |= {"loads": tuple(loads), "sizes": tuple(sizes), "scale": scale, "softcap": cap}  # type: ignore[arg-type]
        for name, text in (("keep", keep), ("bias", bias), ("soft", soft)):
            operands[name] = from_json(str(text)) if text else None
        return cls(node=node, empty_row=str(empty), **operands)

    @property
    def grouped(self) -> bool:
        """Tell whether query heads share key/value heads."""
        return bool(self.q.meta["val"].shape[1] != self.k.meta["val"].shape[1])
