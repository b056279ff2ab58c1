"""Lower any proved predicate to SDPA one block of queries at a time (CPU): windows, chunks, documents, prefixes, offsets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.expr_eval import to_json
from effcompile.core.kernel import Answer, AttentionKernel
from effcompile.core.mask import Mask
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.lowering.attention import estimate
from effcompile.lowering.attention.sdpa import plain
from effcompile.lowering.attention.sinks import empty_rows_known


@dataclass(frozen=True)
class SdpaBlocked(AttentionKernel):
    """Run a predicate on the key range that each block of queries can keep."""

    name: ClassVar[str] = "blocked"

    def supports(self, site: AttentionSite, target: Target) -> Answer:
        """Answer for proved masks without a score addend."""
        if refusal := plain(site, target):
            return refusal
        if target.device.kind != "cpu":
            return Refusal("EFF-A205", "its block loop runs on the host")
        mask = site.mask
        if not isinstance(mask, Mask):
            return Refusal("EFF-A103", f"the mask is opaque: {mask.reason}")
        if mask.bias is not None:
            return Refusal("EFF-A207", "it has no score addend")
        if mask.is_full:
            return Refusal("EFF-A203", "there is no mask")
        if not empty_rows_known(site, mask):
            return Refusal("EFF-A204", "its rule for rows without keys is not one of this kernel's")
        if site.q_len == 1:
            return Refusal("EFF-A206", "one query: a mask of one row costs nothing")
        return estimate.price("blocked", site, target, estimate.density(site))

    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the op."""
        call = AttentionCall.of(node)
        assert call.keep is not None
        op = torch.ops.eff.attention_blocked_v2.default
        operands = (call.q, call.k, call.v, call.sinks, list(call.loads), list(call.sizes), to_json(call.keep))
        return edit.call(op, *operands, call.empty_row, call.scale, like=node)
