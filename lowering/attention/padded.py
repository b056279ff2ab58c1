"""Lower a padded batch to SDPA on each sequence's own keys (CPU): key padding, with or without causal order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.expr import const
from effcompile.core.kernel import Answer, AttentionKernel
from effcompile.core.mask import Mask, causal_offset, key_padding_slot
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.lowering.attention import estimate
from effcompile.lowering.attention.sdpa import plain
from effcompile.lowering.attention.sinks import empty_rows_known

ASSUMED_FILL = 0.7  # of the keys are real; the true share is data


@dataclass(frozen=True)
class SdpaPadded(AttentionKernel):
    """Run key padding (and causal order) as one SDPA per sequence, without a mask tensor."""

    name: ClassVar[str] = "padded"

    def supports(self, site: AttentionSite, target: Target) -> Answer:
        """Answer for masks that are key padding alone, or with square causal order."""
        if refusal := plain(site, target):
            return refusal
        if target.device.kind != "cpu":
            return Refusal("EFF-A205", "reads the padding on the host")
        mask = site.mask
        if not isinstance(mask, Mask) or mask.bias is not None:
            return Refusal("EFF-A203", "the mask is not key padding")
        if not empty_rows_known(site, mask):
            return Refusal("EFF-A204", "its rule for rows without keys is not one of this kernel's")
        rest = [part for part in mask.parts() if key_padding_slot(part) is None]
        causal = [part for part in rest if causal_offset(part) == const(0)]
        if len(rest) != len(causal) or len(causal) > 1 or len(mask.parts()) - len(rest) != 1:
            return Refusal("EFF-A203", "the mask is not key padding alone or with causal order")
        if causal and site.q_len != site.kv_len:
            return Refusal("EFF-A203", "causal over unequal lengths")
        if site.q_len == 1:
            return Refusal("EFF-A206", "one query: a mask of one row costs nothing")
        visited = ASSUMED_FILL**2 * (0.5 if causal else 1.0)
        return estimate.price("padded", site, target, visited)

    def lower(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the op; the padding row is read from the mask's own operand."""
        call = AttentionCall.of(node)
        assert isinstance(site.mask, Mask)
        part = next(part for part in site.mask.parts() if key_padding_slot(part) is not None)
        slot = key_padding_slot(part)
        assert slot is not None
        source = call.loads[slot]
        sizes = (call.q.meta["val"].shape[0], call.k.meta["val"].shape[2])
        key = ("kept", source, part, str(sizes))
        kept = edit.shared(key, (source,), lambda: self._kept(edit, source, part, sizes))
        causal = any(causal_offset(p) is not None for p in site.mask.parts())
        op = torch.ops.eff.attention_padded_v2.default
        operands = (call.q, call.k, call.v, call.sinks, kept, causal)
        return edit.call(op, *operands, call.empty_row, call.scale, like=node)

    def _kept(self, edit: Editor, source: fx.Node, part: object, sizes: tuple[Any, Any]) -> fx.Node:
        from effcompile.core.expr import BATCH, KEY, Expr, axes_of

        assert isinstance(part, Expr)
        load = part if part.op == "load" else next(arg for arg in part.args if arg.op == "load")
        aten, node = torch.ops.aten, source
        for place in reversed(range(len(load.args))):  # constant leading indices select, what remains is [B, K] or [K]
            if load.args[place].is_const:
                node = edit.call(aten.select.int, node, place, int(load.args[place].value or 0))
        if BATCH not in axes_of(load):
            node = edit.call(aten.unsqueeze.default, node, 0)
        elif [int(arg.value or 0) for arg in load.args if arg.op == "axis"] == [KEY, BATCH]:
            node = edit.call(aten.transpose.int, node, 0, 1)
        for dim, wanted in enumerate(sizes):  # the model may have made its mask for more keys, or sequences
            has = node.meta["val"].shape[dim]
            if str(has) != str(wanted) and str(has) != "1":
                node = edit.call(aten.slice.Tensor, node, dim, 0, edit.size(wanted))
        return node if node.meta["val"].dtype == torch.bool else edit.call(aten.ne.Scalar, node, 0)
