"""Fetch the weights of each slot's expert and multiply in one batch: for a few tokens, where no host has to read counts.

Peak memory grows by the fetched weights, S experts of them, so it is refused where that is much. For an id outside [0, E) the
weights of another expert are fetched and the row is set to zero, since `eff::moe_v1` says that such a slot contributes nothing.
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
from effcompile.core.target import Target, element_bytes
from effcompile.lowering.moe.price import price, tokens, weights
from effcompile.lowering.moe.written import write_out
from effcompile.ops.moe import gated

SHARE = 0.05  # of the device's memory that fetched weights may take


@dataclass(frozen=True)
class Batched(ExpertDispatch):
    """Multiply each slot by weights that were fetched for it."""

    name: ClassVar[str] = "batched"
    portable: ClassVar[bool] = True

    def supports(self, site: MoESite, target: Target) -> Answer:
        """Answer where the fetched weights fit."""
        if isinstance(site.tokens, str):
            return Refusal("EFF-M205", "the number of tokens is not known, so that fetched weights have no bound")
        fetched = tokens(site) * site.top_k * weights(site) * element_bytes(site.dtype)
        if fetched > SHARE * target.device.memory_bytes:
            return Refusal("EFF-M205", f"fetched weights take {fetched / 1e9:.1f} GB")
        return price(self.name, site, target)

    def lower(self, node: fx.Node, site: MoESite, edit: Editor) -> fx.Node:
        """Write the products out."""
        return write_out(node, edit, fetched)


def fetched(
    x: Tensor,
    ids: Tensor,
    share: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    call: ExpertsCall[fx.Node],
) -> Tensor:
    """Compute the experts of a layer with fetched weights."""
    kind = torch.promote_types(x.dtype, torch.float32)
    top_k = ids.shape[1]
    flat = ids.reshape(-1)
    inside = ((flat >= 0) & (flat < w1.shape[0]))[:, None]
    flat = flat.clamp(0, w1.shape[0] - 1)
    scale = share.reshape(-1, 1).to(kind)
    rows = x.repeat_interleave(top_k, 0)
    if call.side == "in":
        rows = (rows * scale).to(x.dtype)
    inner = _product(rows, w1[flat], None if b1 is None else b1[flat], call.transposed)
    inner = gated(inner, call.act, call.layout, call.alpha, call.beta, call.limit)
    y = _product(inner, w2[flat], None if b2 is None else b2[flat], call.transposed).to(kind)
    y = torch.where(inside, y if call.side == "in" else y * scale, 0.0)
    return y.reshape(x.shape[0], top_k, -1).sum(1).to(x.dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if transposed:
        y = torch.bmm(x.unsqueeze(1), weight).squeeze(1)
    else:
        y = torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1)
    return y if bias is None else y + bias
