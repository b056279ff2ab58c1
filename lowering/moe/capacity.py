"""Send tokens to places of experts and fetch results by index, where experts have a capacity (Tutel, arXiv:2206.03382).

What the one-hot einsums in the source multiply by 0 is not touched, so time and memory grow with the tokens and not with their
square. Tokens that found their expert full are dropped as the source drops them: places come from its own router.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from effcompile.core.experts import ExpertDispatch, MoESite
from effcompile.core.kernel import Answer, Supported
from effcompile.core.rewrite import Editor
from effcompile.core.site import Refusal
from effcompile.core.target import Target, element_bytes
from effcompile.lowering.moe.price import tokens
from effcompile.ops.moe_capacity import decode, encode


@dataclass(frozen=True)
class Capacity(ExpertDispatch):
    """Write the two halves out as operations of the graph."""

    name: ClassVar[str] = "capacity"
    capacity: ClassVar[bool] = True

    def supports(self, site: MoESite, target: Target) -> Answer:
        """Answer for every site with capacity: rows are moved once each way."""
        if not site.capacity:
            return Refusal("EFF-M208", "its experts have no capacity")
        slots = tokens(site) * site.top_k
        places = site.capacity * site.experts if isinstance(site.capacity, int) else slots
        rows = 2.0 * slots + 2.0 * places
        moved = 2.0 * rows * site.hidden * element_bytes(site.dtype)
        return Supported(moved / target.device.memory_bandwidth + 4.0 * target.device.call_overhead)

    def lower(self, node: fx.Node, site: MoESite, edit: Editor) -> fx.Node:
        """Insert the operations of one half."""
        if node.target is torch.ops.eff.moe_encode_v1.default:
            *operands, experts, capacity = node.args
            sizes = [item.meta["val"] if isinstance(item, fx.Node) else item for item in (experts, capacity)]
            if any(isinstance(size, torch.SymInt) for size in sizes):
                return node  # its sizes are nodes of the graph, which a written-out function does not take
            return edit.inline(lambda *given: encode(*given, *sizes), *operands)
        return edit.inline(decode, *node.args)
