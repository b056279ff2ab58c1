"""Emit attention with sink logits on CPU: torch's flash kernel, and one factor a row from its LSE.

O * sigmoid(LSE - sink), see `effcompile/ops/sinks.py`. Left as torch operations, so that TorchInductor joins the factor with what
reads the result. The flash kernel is called by its own name because `scaled_dot_product_attention` keeps its LSE to itself; what
that function does before the kernel is done here: it wants elements of a row side by side, and a mask of floats.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.expr import TRUE
from effcompile.core.mask import Mask
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target


def sinkable(site: AttentionSite, target: Target) -> Refusal | None:
    """Return why no kernel gives the LSE that the sinks of a site need, else None."""
    if target.device.kind != "cpu":
        return Refusal("EFF-A202", "sink logits need the LSE of each row, which is had on CPU only")
    if 0 in (site.batch, site.q_len, site.kv_len):
        return Refusal("EFF-A202", "sink logits without any query or key")
    return None


def empty_rows_known(site: AttentionSite, mask: Mask) -> bool:
    """Tell whether the CPU ops know what a row without keys gives: 0, or the mean of all values; NaN only where a sink prevents it.

    Of a mean a sink leaves what the fill decides; they take it to be the least number.
    """
    if mask.empty_row == "nan":
        return site.sinks
    if mask.empty_row == "uniform":
        return mask.soft == TRUE and (not site.sinks or set(mask.fill.split("+")) <= {"min", "-inf"})
    return True


def emit_with_sinks(edit: Editor, call: AttentionCall, mask: fx.Node | None, causal: bool) -> fx.Node:
    """Insert the flash kernel and the factor; the mask is bool (True keeps) or added to the scores."""
    assert call.sinks is not None
    aten = torch.ops.aten
    q, k, v = (_dense(edit, x) for x in (call.q, call.k, call.v))
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        key, given = ("added", mask, q.meta["val"].dtype), mask
        mask = edit.shared(key, (given,), lambda: _added(edit, given, q.meta["val"].dtype))
    flash = aten._scaled_dot_product_flash_attention_for_cpu.default
    both = edit.call(flash, q, k, v, 0.0, causal, attn_mask=mask, scale=call.scale, like=call.node)
    out, lse = (edit.call(operator.getitem, both, place) for place in range(2))
    sinks = call.sinks
    if sinks.meta["val"].dtype != lse.meta["val"].dtype:
        sinks = edit.call(aten.to.dtype, sinks, lse.meta["val"].dtype)
    gate = edit.call(aten.sigmoid.default, edit.call(aten.sub.Tensor, lse, edit.call(aten.unsqueeze.default, sinks, 1)))
    scaled = edit.call(aten.mul.Tensor, out, edit.call(aten.unsqueeze.default, gate, 3))
    if scaled.meta["val"].dtype == out.meta["val"].dtype:
        return scaled
    return edit.call(aten.to.dtype, scaled, out.meta["val"].dtype, like=call.node)


def _dense(edit: Editor, node: fx.Node) -> fx.Node:
    return node if node.meta["val"].stride(3) == 1 else edit.call(torch.ops.aten.contiguous.default, node)


def _added(edit: Editor, mask: fx.Node, dtype: torch.dtype) -> fx.Node:
    aten = torch.ops.aten
    zeros = edit.call(aten.zeros_like.default, mask, dtype=dtype)
    return edit.call(aten.masked_fill.Scalar, zeros, edit.call(aten.logical_not.default, mask), -math.inf)
