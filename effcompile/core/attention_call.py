"""Read the operands of an `eff::attention_v1` node by name."""

from __future__ import annotations

from dataclasses import dataclass

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
        read = [from_json(str(text)) if text else None for text in (keep, bias, soft)]
        return cls(node, q, k, v, mask, sinks, tuple(loads), tuple(sizes), *read, str(empty), float(scale), float(cap))  # type: ignore[arg-type]

    @property
    def grouped(self) -> bool:
        """Tell whether query heads share key/value heads."""
        return bool(self.q.meta["val"].shape[1] != self.k.meta["val"].shape[1])
