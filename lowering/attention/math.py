"""Lower to plain ATen products and softmax, as the source spelled it: what no other kernel can run exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.kernel import Answer, AttentionKernel
from effcompile.core.mask import Mask
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.lowering.attention import estimate


@dataclass(frozen=True)
class Math(AttentionKernel):
    """Run softcap, sinks, any mask tensor and NaN rows."""

    name: ClassVar[str] = "math"
    portable: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def supports(self, site: AttentionSite, target: Target) -> Answer:
        """Answer for every spelled-out chain; an SDPA call has its own fallback."""
        if site.idiom.startswith("sdpa"):
            return Refusal("EFF-A208", "the source is SDPA, which the dense kernel keeps")
        return estimate.price("math", site, target, 1.0)

    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the chain."""
        aten, call = torch.ops.aten, AttentionCall.of(node)
        k, v = (self._repeated(edit, call, x) for x in (call.k, call.v))
        q, flex = call.q, site.idiom.startswith("flex")
        if flex:  # whose scores are float32 whatever the operands are
            wide = torch.promote_types(q.meta["val"].dtype, torch.float32)
            q, k = (edit.call(aten.to.dtype, x, wide) for x in (q, k))
        scores = edit.call(aten.matmul.default, q, edit.call(aten.transpose.int, k, -1, -2))
        if call.scale != 1.0:
            scores = edit.call(aten.mul.Tensor, scores, call.scale)
        if call.softcap:
            scores = edit.call(aten.tanh.default, edit.call(aten.div.Tensor, scores, call.softcap))
            scores = edit.call(aten.mul.Tensor, scores, call.softcap)
        if call.mask is not None:
            dtype = call.mask.meta["val"].dtype
            if dtype == torch.bool:
                gone = edit.call(aten.logical_not.default, call.mask)
                scores = edit.call(aten.masked_fill.Scalar, scores, gone, float("-inf"))
            else:
                scores = edit.call(aten.add.Tensor, scores, call.mask)
        elif isinstance(site.mask, Mask):
            assert site.mask.is_full, "a proved mask of a chain keeps its tensor"
        if call.sinks is not None:
            scores = self._with_sinks(edit, scores, call.sinks)
        wide = torch.promote_types(scores.meta["val"].dtype, torch.float32)
        if flex and isinstance(site.mask, Mask) and site.mask.empty_row != "never":
            probs = edit.call(aten._safe_softmax.default, scores, -1)
        else:
            probs = edit.call(aten.softmax.int, scores, -1, wide)
        if call.sinks is not None:
            probs = edit.call(aten.slice.Tensor, probs, 3, 0, -1)
        if probs.meta["val"].dtype != v.meta["val"].dtype:
            probs = edit.call(aten.to.dtype, probs, v.meta["val"].dtype)
        return edit.call(aten.matmul.default, probs, v, like=node)

    def _repeated(self, edit: Editor, call: AttentionCall, node: fx.Node) -> fx.Node:
        if not call.grouped:
            return node
        aten = torch.ops.aten
        batch, heads, length, width = node.meta["val"].shape
        group = int(call.q.meta["val"].shape[1]) // int(heads)
        sizes = [edit.size(n) for n in (batch, heads, group, length, width)]
        wide = edit.call(aten.expand.default, edit.call(aten.unsqueeze.default, node, 2), sizes)
        return edit.call(aten.reshape.default, wide, [sizes[0], int(heads) * group, sizes[3], sizes[4]])

    def _with_sinks(self, edit: Editor, scores: fx.Node, sinks: fx.Node) -> fx.Node:
        aten = torch.ops.aten
        batch, heads, rows, _ = scores.meta["val"].shape
        column = edit.call(aten.reshape.default, sinks, [1, int(heads), 1, 1])
        column = edit.call(aten.expand.default, column, [edit.size(batch), int(heads), edit.size(rows), 1])
        if column.meta["val"].dtype != scores.meta["val"].dtype:
            column = edit.call(aten.to.dtype, column, scores.meta["val"].dtype)
        return edit.call(aten.cat.default, [scores, column], -1)
