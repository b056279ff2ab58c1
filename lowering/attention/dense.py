"""Lower to SDPA with the mask tensor the model built: the exact fallback, and the best choice for a single query."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.errors import RewriteError
from effcompile.core.kernel import Answer, AttentionKernel
from effcompile.core.mask import Mask
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.lowering.attention import estimate
from effcompile.lowering.attention.sdpa import emit_sdpa, is_square_causal, sink_gradient, whole


@dataclass(frozen=True)
class SdpaDense(AttentionKernel):
    """Run any mask as its tensor."""

    name: ClassVar[str] = "dense"
    portable: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def supports(self, site: AttentionSite, target: Target) -> Answer:
        """Answer for everything but softcap, and rows that the source leaves NaN (SDPA gives 0 there, as a sink does)."""
        if refusal := whole(site, target):
            return refusal
        chain = not site.idiom.startswith("sdpa")
        if chain and not site.sinks and (not isinstance(site.mask, Mask) or site.mask.empty_row == "nan"):
            return Refusal("EFF-A204", "a row without keys is NaN in the source and 0 in SDPA")
        if isinstance(site.mask, Mask) and site.mask.is_full:
            return Refusal("EFF-A203", "there is no mask")
        return estimate.price("dense", site, target, 1.0)

    def gradient(self, site: AttentionSite) -> Refusal | None:
        """Refuse chains with rows without keys: SDPA's backward recomputes exp(score - LSE), and there LSE rounds to the fill."""
        if refusal := sink_gradient(site):
            return refusal
        if site.idiom.startswith("sdpa") or (isinstance(site.mask, Mask) and site.mask.empty_row == "never"):
            return None
        return Refusal("EFF-A302", "SDPA's backward gives a row without keys n times its gradient")

    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert SDPA with the mask operand."""
        import torch

        call = AttentionCall.of(node)
        mask = call.mask
        if mask is None and is_square_causal(site):  # the source said is_causal
            return emit_sdpa(edit, call, None, True)
        if mask is None:
            raise RewriteError("EFF-X905", f"site {site.id} has no mask tensor", site=site.id)
        wanted, has = call.q.meta["val"].dtype, mask.meta["val"].dtype
        if mask.meta["val"].dim() == 3:
            mask = edit.call(torch.ops.aten.unsqueeze.default, mask, 0)
        # The flash kernel itself, which is what sinks call, adds float32 to the scores of narrower operands.
        if has in (torch.bool, wanted) or (call.sinks is not None and wanted.itemsize == 2 and has == torch.float32):
            return emit_sdpa(edit, call, mask, False)
        if isinstance(site.mask, Mask) and site.mask.bias is None and site.mask.empty_row in ("never", "zero"):
            return emit_sdpa(edit, call, edit.call(torch.ops.aten.to.dtype, mask, wanted), False)
        # A narrower mask would round its addends, and turn the least float32 into -inf, which changes rows without keys.
        wide = torch.promote_types(has, wanted)
        q, k, v, mask = (edit.call(torch.ops.aten.to.dtype, x, wide) for x in (call.q, call.k, call.v, mask))
        result = emit_sdpa(edit, replace(call, q=q, k=k, v=v), mask, False)
        return edit.call(torch.ops.aten.to.dtype, result, wanted, like=node)
