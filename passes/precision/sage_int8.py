"""Take query-key products of 8-bit integers; probabilities and values keep their type (SageAttention)."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.expr import Expr
from effcompile.core.kernel import Supported
from effcompile.core.mask import Mask, causal_offset, describe, window_both, window_left
from effcompile.core.policy import RAISED, Estimate, Exactness, Kernels, Policy, Proposal
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target

_BLOCKS, _INT8_BLOCKS = "eff::attention_blocks_v1", "eff::int8_blocks_v1"
SHORTEST = 128
"""Queries below which rounding all keys costs more than it saves: one block of queries."""


@dataclass(frozen=True)
class Band:
    """Hold a mask as the op has it: query i keeps key j iff i + offset - left <= j <= i + offset + right; -1 is open."""

    left: int = -1
    right: int = -1
    offset: int = 0


@dataclass(frozen=True)
class SageInt8(Policy):
    """Round queries and keys to int8, one scale for each block of rows, after the mean key was taken off all keys."""

    name: ClassVar[str] = "sage-int8"
    family: ClassVar[str] = "precision"
    paper: ClassVar[str] = "arXiv:2410.02367"
    exactness: ClassVar[Exactness] = "lossy"
    op: ClassVar[str] = "eff::int8_attention_v1"
    inside: ClassVar[tuple[str, ...]] = (RAISED, _BLOCKS)

    def leaves(self, op: str) -> str:
        """Return the op with 8-bit products: over a map of blocks where a pattern left one."""
        return _INT8_BLOCKS if op == _BLOCKS else self.op

    def propose(self, site: AttentionSite, target: Target, kernels: Kernels) -> Proposal:
        """Accept full, causal and window masks with known distances, and maps of blocks, where the target has a kernel."""
        if isinstance(site.q_len, int) and site.q_len < SHORTEST:
            return Refusal(
                "EFF-A502", f"too short: {site.q_len} queries, and a block that shares a scale has {SHORTEST}"
            )
        if kernels.before == RAISED and isinstance(found := band_of(site), Refusal):
            return found
        answers = [kernel.supports(site, target, kernels.density) for kernel in kernels.of(self.leaves(kernels.before))]
        able = [answer for answer in answers if isinstance(answer, Supported)]
        if not able:
            why = "; ".join(str(answer) for answer in answers)
            return Refusal("EFF-A505", f"no kernel on {target} takes 8-bit products ({why})", "a GPU target")
        best = min(able, key=lambda answer: answer.seconds)
        return Estimate(best.seconds, 1.0, best.tag)

    def told(self, estimate: Estimate, site: AttentionSite) -> str:
        """Return what the plan says of the site."""
        return f"8-bit query-key products under {site.mask}"

    def apply(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the op and take its first result; q, k and v are those of the node. Over a map the operands stay what they are."""
        if node.target is torch.ops.eff.attention_blocks_v1.default:
            return edit.call(torch.ops.eff.int8_blocks_v1.default, *node.args, like=node)
        call, found = AttentionCall.of(node), band_of(site)
        assert isinstance(found, Band), f"{self.name} was applied to a site that it refuses: {found}"
        operands = (call.q, call.k, call.v, None, None, found.left, found.right, found.offset, call.scale)
        pair = edit.call(torch.ops.eff.int8_attention_v1.default, *operands)
        pair.meta["eff.site"] = node.meta["eff.site"]
        return edit.call(operator.getitem, pair, 0, like=node)


def band_of(site: AttentionSite) -> Band | Refusal:
    """Return the mask of a site as a band, or why it is none that the op can have."""
    if not isinstance(site.mask, Mask):
        return Refusal("EFF-A103", f"the mask is opaque: {site.mask.reason}")
    if site.softcap:
        return Refusal("EFF-A201", "attention with 8-bit products has no softcap")
    if site.sinks:
        return Refusal("EFF-A202", "attention with 8-bit products has no sink logits")
    if site.mask.bias is not None:
        return Refusal("EFF-A207", "attention with 8-bit products has no score addend")
    offset, far, right = 0, None, -1
    for part in site.mask.parts():
        causal, window, both = causal_offset(part), window_left(part), window_both(part)
        number = _number(next((e for e in (causal, window, both) if e is not None), None))
        if number is None:
            return Refusal("EFF-A203", f"`{describe(part)}` is no band of known width around the diagonal")
        if both is not None:
            far, right = number, number
        elif causal is not None:
            offset, right = number, 0
        else:
            far = number
    left = -1 if far is None else far + offset
    own = site.q_len == site.kv_len and offset >= 0 and (far is None or left >= 0)
    if (far is not None and left < 0) or not (own or site.mask.is_full or site.mask.empty_row in ("zero", "never")):
        return Refusal("EFF-A204", f"a row without keys gives {site.mask.empty_row} in the source, and 0 here")
    return Band(left, right, offset)


def _number(part: Expr | None) -> int | None:
    return int(part.value) if part is not None and part.op == "const" and part.value is not None else None
