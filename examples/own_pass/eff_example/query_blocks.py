"""Run causal attention, with or without softcap, one block of queries at a time.

Each block multiplies only the keys up to its own end, which leaves little more than half of the products. It consists
of plain ATen operations, so gradients flow; among the built-in kernels with softcap only `math` offers that. Softcap:
Gemma 2, arXiv:2408.00118.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.kernel import Answer, AttentionKernel, Supported
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.lowering.attention import estimate
from effcompile.lowering.attention.sdpa import is_square_causal

aten = torch.ops.aten


@dataclass(frozen=True)
class QueryBlocks(AttentionKernel):
    """Cut the queries into blocks of `block` rows."""

    block: int = 64

    name: ClassVar[str] = "query-blocks"
    differentiable: ClassVar[bool] = True

    def supports(self, site: AttentionSite, target: Target) -> Answer:
        """Say how long a site would take, or why it cannot run here; the reason is what `eff explain` prints."""
        if site.sinks or site.heads != site.kv_heads:
            return Refusal("OWN-001", "neither sink logits nor grouped heads")
        if not is_square_causal(site) or not isinstance(site.q_len, int):
            return Refusal("OWN-002", "the mask is not causal over equal, known lengths")
        if site.q_len < 2 * self.block:
            return Refusal("OWN-003", f"fewer than two blocks of {self.block} queries")
        blocks = -(-site.q_len // self.block)
        return Supported(estimate.seconds("math", site, target, (blocks + 1) / (2 * blocks)))

    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the operations before `node` and return the node of the result `[B, H, S, D]`."""
        call = AttentionCall.of(node)
        assert isinstance(site.q_len, int)
        parts = [
            self._block(edit, call, start, min(start + self.block, site.q_len))
            for start in range(0, site.q_len, self.block)
        ]
        return edit.call(aten.cat.default, parts, 2, like=node)

    def _block(self, edit: Editor, call: AttentionCall, start: int, stop: int) -> fx.Node:
        q = edit.call(aten.slice.Tensor, call.q, 2, start, stop)
        k, v = (edit.call(aten.slice.Tensor, x, 2, 0, stop) for x in (call.k, call.v))
        scores = edit.call(aten.matmul.default, q, edit.call(aten.transpose.int, k, -1, -2))
        scores = edit.call(aten.mul.Tensor, scores, call.scale)
        if call.softcap:
            scores = edit.call(aten.tanh.default, edit.call(aten.div.Tensor, scores, call.softcap))
            scores = edit.call(aten.mul.Tensor, scores, call.softcap)
        value = call.q.meta["val"]
        ones = edit.call(aten.ones.default, [stop - start, stop], dtype=torch.bool, device=value.device)
        later = edit.call(aten.logical_not.default, edit.call(aten.tril.default, ones, start))
        scores = edit.call(aten.masked_fill.Scalar, scores, later, float("-inf"))
        weights = edit.call(aten.softmax.int, scores, -1, torch.float32)
        if value.dtype != torch.float32:
            weights = edit.call(aten.to.dtype, weights, value.dtype)
        return edit.call(aten.matmul.default, weights, v)
