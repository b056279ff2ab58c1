"""Sort tokens by expert and multiply by groups, `torch._grouped_mm`: for many tokens, without a host read.

Rows behind the last group are not written by a grouped product, whatever lies there. Slots whose id is outside [0, E) sort
behind it, so they are zeroed on the way in and on the way out: zero times what is not a number is none either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from effcompile.core.experts import ExpertDispatch, ExpertsCall, MoESite
from effcompile.core.kernel import Answer
from effcompile.core.rewrite import Editor
from effcompile.core.site import Refusal
from effcompile.core.target import Target
from effcompile.lowering.moe.price import price
from effcompile.lowering.moe.written import write_out
from effcompile.ops.moe import gated


@dataclass(frozen=True)
class Grouped(ExpertDispatch):
    """Multiply groups of sorted tokens by their expert."""

    name: ClassVar[str] = "grouped"

    def supports(self, site: MoESite, target: Target) -> Answer:
        """Answer for what TorchInductor takes: bfloat16, rows of whole 16 bytes."""
        if site.dtype != "bfloat16":
            return Refusal("EFF-M204", f"TorchInductor's grouped products are in bfloat16, not {site.dtype}")
        if site.hidden % 8 or site.inner % 8:
            return Refusal("EFF-M206", f"rows of {site.hidden} and {site.inner} numbers, of which 8 have to fit in")
        return price(self.name, site, target)

    def lower(self, node: fx.Node, site: MoESite, edit: Editor) -> fx.Node:
        """Write the sort and the products out."""
        return write_out(node, edit, by_groups)


def by_groups(
    x: Tensor,
    ids: Tensor,
    share: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    call: ExpertsCall[fx.Node],
) -> Tensor:
    """Compute the experts of a layer on tokens sorted by expert."""
    kind = torch.promote_types(x.dtype, torch.float32)
    experts, top_k = w1.shape[0], ids.shape[1]
    flat = ids.reshape(-1)
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    sorted_ids, order = torch.sort(flat, stable=True)
    numbers = torch.arange(experts, device=x.device)
    offsets = torch.searchsorted(sorted_ids, numbers, right=True).to(torch.int32)
    inside = (sorted_ids < experts)[:, None]
    known = sorted_ids.clamp(max=experts - 1)
    scale = share.reshape(-1)[order][:, None].to(kind)
    rows = torch.where(inside, x[order // top_k], 0.0)
    if call.side == "in":
        rows = torch.where(inside, rows * scale, 0.0).to(x.dtype)
    inner = _product(rows, w1, None if b1 is None else b1[known], offsets, call.transposed)
    inner = gated(torch.where(inside, inner, 0.0), call.act, call.layout, call.alpha, call.beta, call.limit)
    y = _product(inner, w2, None if b2 is None else b2[known], offsets, call.transposed).to(kind)
    y = torch.where(inside, y if call.side == "in" else y * scale, 0.0)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=x.device))
    return y[back].reshape(x.shape[0], top_k, -1).sum(1).to(x.dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, transposed: bool) -> Tensor:
    y = torch._grouped_mm(x, weight if transposed else weight.transpose(-2, -1), offs=offsets)
    return y if bias is None else y + bias
