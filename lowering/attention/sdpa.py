"""Lower to torch's SDPA without a mask tensor: full, or causal where the query and key ranges are the same square."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.expr import const
from effcompile.core.kernel import NO_GRAD, Answer, AttentionKernel
from effcompile.core.mask import Mask, causal_offset
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.lowering.attention import estimate
from effcompile.lowering.attention.sinks import emit_with_sinks, sinkable


def plain(site: AttentionSite, target: Target) -> Refusal | None:
    """Return why SDPA cannot run the site at all, else None."""
    if site.softcap:
        return Refusal("EFF-A201", "SDPA has no softcap")
    return sinkable(site, target) if site.sinks else None


def whole(site: AttentionSite, target: Target) -> Refusal | None:
    """Return why one SDPA call cannot run the site, else None."""
    if site.sinks and site.head_dim != site.value_dim:
        return Refusal("EFF-A210", f"no LSE with head dimensions {site.head_dim} and {site.value_dim}")
    if site.sinks and target.portable:
        return Refusal("EFF-A215", "the LSE that sinks need comes from a kernel of torch")
    return plain(site, target)


def sink_gradient(site: AttentionSite) -> Refusal | None:
    """Return why no gradient flows through a site with sinks, else None."""
    return Refusal("EFF-A301", "no gradient flows through the LSE", NO_GRAD) if site.sinks else None


def is_square_causal(site: AttentionSite) -> bool:
    """Tell whether the mask is k <= q over equal query and key lengths."""
    if not isinstance(site.mask, Mask) or site.mask.bias is not None or site.q_len != site.kv_len:
        return False
    parts = site.mask.parts()
    return len(parts) == 1 and causal_offset(parts[0]) == const(0)


def emit_sdpa(edit: Editor, call: AttentionCall, mask: fx.Node | None, causal: bool) -> fx.Node:
    """Insert the SDPA call, or where the site has sinks the flash kernel behind it."""
    if call.sinks is not None:
        return emit_with_sinks(edit, call, mask, causal)
    kwargs: dict[str, Any] = {"scale": call.scale}
    if call.grouped:
        kwargs["enable_gqa"] = True
    op = torch.ops.aten.scaled_dot_product_attention.default
    return edit.call(op, call.q, call.k, call.v, mask, 0.0, causal, like=call.node, **kwargs)


@dataclass(frozen=True)
class SdpaFull(AttentionKernel):
    """Run a site whose every query reads every key."""

    name: ClassVar[str] = "sdpa"
    portable: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def supports(self, site: AttentionSite, target: Target) -> Answer:
        """Answer for full masks."""
        if refusal := whole(site, target):
            return refusal
        if not isinstance(site.mask, Mask) or not site.mask.is_full:
            return Refusal("EFF-A203", "the mask is not full")
        return estimate.price("sdpa", site, target, 1.0)

    def gradient(self, site: AttentionSite) -> Refusal | None:
        """Refuse sinks: torch's backward takes no gradient of the LSE."""
        return sink_gradient(site)

    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert SDPA without a mask."""
        return emit_sdpa(edit, AttentionCall.of(node), None, False)


@dataclass(frozen=True)
class SdpaCausal(AttentionKernel):
    """Run a square causal site with `is_causal=True`: half the blocks, no mask tensor."""

    name: ClassVar[str] = "sdpa-causal"
    portable: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def supports(self, site: AttentionSite, target: Target) -> Answer:
        """Answer for square causal masks."""
        if refusal := whole(site, target):
            return refusal
        if not is_square_causal(site):
            return Refusal("EFF-A203", "the mask is not causal over equal lengths")
        return estimate.price("sdpa-causal", site, target, 0.5)

    def gradient(self, site: AttentionSite) -> Refusal | None:
        """Refuse sinks: torch's backward takes no gradient of the LSE."""
        return sink_gradient(site)

    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert causal SDPA."""
        return emit_sdpa(edit, AttentionCall.of(node), None, True)
