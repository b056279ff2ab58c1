"""Run all experts on all tokens, with weight 0 outside the chosen ones: where nearly every token wants nearly every expert.

What an expert makes of a token that did not choose it is dropped, not multiplied by 0, so that it may be anything.
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

MOST = 4  # experts over top_k beyond which it is not worth an answer: it multiplies that many times as much


@dataclass(frozen=True)
class Dense(ExpertDispatch):
    """Multiply everything in batches over the experts."""

    name: ClassVar[str] = "dense"
    portable: ClassVar[bool] = True

    def supports(self, site: MoESite, target: Target) -> Answer:
        """Answer for weights on the output side, where few experts are left out."""
        if site.side != "out":
            return Refusal("EFF-M206", "weights multiply the tokens, and an expert is not linear")
        if site.experts > MOST * site.top_k and not target.portable:
            return Refusal("EFF-M207", f"{site.top_k} of {site.experts} experts are wanted")
        return price(self.name, site, target)

    def lower(self, node: fx.Node, site: MoESite, edit: Editor) -> fx.Node:
        """Write the products out."""
        return write_out(node, edit, everywhere)


def everywhere(
    x: Tensor,
    ids: Tensor,
    share: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    call: ExpertsCall[fx.Node],
) -> Tensor:
    """Compute all experts on all tokens and keep what was chosen."""
    kind = torch.promote_types(x.dtype, torch.float32)
    experts = w1.shape[0]
    chosen = ids[:, :, None] == torch.arange(experts, device=ids.device)
    scale = (chosen * share[:, :, None].to(kind)).sum(1)  # an id may be there twice
    wanted = chosen.any(1)
    first, second = (w1, w2) if call.transposed else (w1.transpose(1, 2), w2.transpose(1, 2))
    inner = torch.bmm(x.expand(experts, -1, -1), first)
    inner = inner if b1 is None else inner + b1[:, None]
    inner = gated(inner, call.act, call.layout, call.alpha, call.beta, call.limit)
    y = torch.bmm(inner, second)
    y = (y if b2 is None else y + b2[:, None]).to(kind)
    y = torch.where(wanted.t()[:, :, None], y * scale.t()[:, :, None], 0.0)
    return y.sum(0).to(x.dtype)
