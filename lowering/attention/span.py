"""Lower one query over a cache of fixed size to attention over the keys that are there (CPU).

The mask of a static cache is `k <= q + t`, t being the counter of its tokens. The range is computed in the graph, once for all
layers, and each layer's attention reads that part of the capacity and no mask tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.expr import BATCH, TRUE, apply, axes_of, const, walk
from effcompile.core.expr_eval import evaluate, to_json
from effcompile.core.kernel import Answer, AttentionKernel, Supported
from effcompile.core.mask import Mask
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.lowering.attention import estimate
from effcompile.lowering.attention.sdpa import plain
from effcompile.lowering.attention.sinks import empty_rows_known
from effcompile.ops.row_limits import RowLimits, split_limits

ASSUMED_FILL = 0.5  # of the capacity holds tokens, on the way from none to all; the true share is data
_BEYOND = 1 << 40  # after every key


@dataclass(frozen=True)
class SdpaSpan(AttentionKernel):
    """Run one query on the range of keys that its mask leaves, where the end of the range is data."""

    name: ClassVar[str] = "span"

    def supports(self, site: AttentionSite, target: Target) -> Answer:
        """Answer for one query whose last key is data; what the mask has beside the range is read as a tensor."""
        if refusal := plain(site, target):
            return refusal
        if target.device.kind != "cpu":
            return Refusal("EFF-A205", "reads the range on the host")
        if site.q_len != 1:
            return Refusal("EFF-A214", "more than one query")
        mask = site.mask
        if not isinstance(mask, Mask):
            return Refusal("EFF-A103", f"the mask is opaque: {mask.reason}")
        if mask.bias is not None:
            return Refusal("EFF-A207", "it has no score addend")
        if not empty_rows_known(site, mask):
            return Refusal("EFF-A204", "its rule for rows without keys is not one of this kernel's")
        parts = split_limits(to_json(mask.keep))
        if not any(node.op == "load" for last in parts.last for node in walk(last)):
            return Refusal("EFF-A203", "the last key is not data")
        # Modelled even where the rate is measured: how much of the capacity is filled is data.
        return Supported(estimate.seconds("span", site, target, ASSUMED_FILL))

    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the op, and the range once for all sites with the same mask."""
        call = AttentionCall.of(node)
        assert call.keep is not None
        parts = split_limits(to_json(call.keep))
        more = any(part != TRUE for part in (parts.keys, parts.rows, parts.rest))
        operands = (self._mask(edit, call) if more else None, call.sinks, self._span(edit, call, parts))
        op = torch.ops.eff.attention_span_v1.default
        return edit.call(op, call.q, call.k, call.v, *operands, call.empty_row, call.scale, like=node)

    def _span(self, edit: Editor, call: AttentionCall, parts: RowLimits) -> fx.Node:
        """Return the first and the last key, `[2, B|1]`."""
        first, last = const(0), const(_BEYOND)
        for expr in parts.first:
            first = apply("maximum", first, expr)
        for expr in parts.last:
            last = apply("minimum", last, expr)
        device, loads = call.q.meta["val"].device, call.loads
        rows = call.q.meta["val"].shape[0] if BATCH in axes_of(first) | axes_of(last) else 1

        def values(*operands: Any) -> torch.Tensor:
            zero = torch.zeros((1,), dtype=torch.int64, device=device)
            axes = (torch.arange(operands[0], device=device), zero, zero, zero)
            given = operands[1 : 1 + len(loads)], operands[1 + len(loads) :]
            return torch.stack([evaluate(expr, axes, *given).expand(operands[0]) for expr in (first, last)])

        operands = (edit.size(rows), *loads, *call.sizes)
        key = ("span", to_json(first), to_json(last), *operands)
        return edit.shared(key, operands, lambda: edit.inline(values, *operands))

    def _mask(self, edit: Editor, call: AttentionCall) -> fx.Node:
        """Return the mask as booleans `[B|1, H|1, 1, K]`: the model's own tensor where it is one."""
        keys = call.k.meta["val"].shape[2]
        given = None if call.mask is None else call.mask.meta["val"]
        if given is not None and given.dtype == torch.bool and given.dim() == 4 and str(given.shape[3]) == str(keys):
            assert call.mask is not None
            return call.mask
        shape = call.q.meta["val"].shape
        extents = [edit.size(n) for n in (*shape[:3], keys)]
        loads, sizes, keep = list(call.loads), list(call.sizes), to_json(call.keep or TRUE)
        operands = (loads, sizes, keep, "", "", "zero", *extents, call.q.meta["val"].device)
        op = torch.ops.eff.mask_tensor_v1.default
        needed = (*loads, *sizes, *extents)
        return edit.shared(("mask-tensor", str(operands)), needed, lambda: edit.call(op, *operands))
