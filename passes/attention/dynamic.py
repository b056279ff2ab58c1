"""Hold what patterns that depend on data have in common: a selector reads q and k, attention runs over the map that it returns."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.density import extent, visited
from effcompile.core.expr_eval import to_json
from effcompile.core.kernel import Supported
from effcompile.core.mask import Mask
from effcompile.core.narrow import align
from effcompile.core.policy import Estimate, Kernels, Proposal
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target, element_bytes
from effcompile.passes.attention.pattern import AttentionPattern

GEMM = 0.4
"""Assume this share of a device's peak for the products of a selector: they are small."""
_CALL = 3e-4
"""Seconds of a selector apart from its work, where it was not measured."""


@dataclass(frozen=True)
class DynamicPattern(AttentionPattern):
    """Choose blocks of keys at run time, for each block of queries.

    Subclasses say what they serve (`phase`), how large their blocks are, and how to call their selector.
    """

    op: ClassVar[str] = "eff::attention_blocks_v1"
    chooses: ClassVar[bool] = True
    phase: ClassVar[str] = "prefill"
    """Name what the pattern serves: `prefill` (many queries), `decode` (one query), or `both`."""
    ordered: ClassVar[bool] = False
    """Say that the pattern means something only where each query has a last key (causal order)."""

    @abstractmethod
    def blocks(self, site: AttentionSite) -> tuple[int, int]:
        """Return the sizes of the blocks (queries, keys) at a site."""

    @abstractmethod
    def least(self, site: AttentionSite) -> int:
        """Return the number of keys up to which the pattern leaves nothing out."""

    @abstractmethod
    def expected(self, site: AttentionSite) -> float:
        """Return the density to price the site at: the pattern's own setting, or what is assumed where data decides."""

    @abstractmethod
    def search(self, site: AttentionSite) -> float:
        """Return the FLOP of the selector's products."""

    @abstractmethod
    def choose(self, call: AttentionCall, head: tuple[Any, ...], site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the selector; `head` holds its first operands (q, k, loads, sizes, keep)."""

    def map(self, call: AttentionCall, head: tuple[Any, ...], site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert what makes the map of blocks to compute: the selector, and what a pattern does to its map."""
        return self.choose(call, head, site, edit)

    def estimate(self, site: AttentionSite, target: Target, kernels: Kernels) -> Proposal:
        """Refuse what the pattern does not serve; the price is that of the fastest kernel and of the selector."""
        assert isinstance(site.mask, Mask)
        if isinstance(site.heads, int) and isinstance(site.kv_heads, int) and site.heads % site.kv_heads:
            return Refusal("EFF-A507", f"{site.heads} query heads and {site.kv_heads} key heads: no whole groups")
        if refusal := self._phase(site):
            return refusal
        at = align(site)
        if isinstance(at, Refusal):
            return at
        if self.ordered and not at.causal:
            return Refusal("EFF-A504", "no causal order: the pattern speaks of keys before a query")
        if isinstance(site.kv_len, int) and site.kv_len <= self.least(site):
            return Refusal(
                "EFF-A502", f"too short: {site.kv_len} keys, and the pattern keeps at least {self.least(site)}"
            )
        density = self.expected(site)
        found = [(kernel, kernel.supports(site, target, density)) for kernel in kernels.of(self.op)]
        able = [answer for _, answer in found if isinstance(answer, Supported)]
        if not able:
            return _why_not(found, target)
        best = min(able, key=lambda answer: answer.seconds)
        choice = self._selecting(site, target, kernels)
        tag = "measured" if best.tag == choice.tag == "measured" else "modelled"
        return Estimate(best.seconds + choice.seconds, density, tag)

    def _phase(self, site: AttentionSite) -> Refusal | None:
        if self.phase == "prefill" and site.q_len == 1:
            return Refusal("EFF-A508", "one query: the pattern is for prefill", "attention=quest serves decode")
        if self.phase == "decode" and site.q_len != 1:
            return Refusal(
                "EFF-A508", f"{site.q_len} queries: the pattern is for decode", "attention=block-topk serves prefill"
            )
        return None

    def _selecting(self, site: AttentionSite, target: Target, kernels: Kernels) -> Supported:
        """Return the time of the selector: measured, or its products, and q and k read once.

        In decode that is half of what the fastest exact kernel reads.
        """
        known = kernels.choosing(self.name, site, target, self.search(site))
        if known is not None:
            return known
        whole = [
            answer.seconds for kernel in kernels.exact if isinstance(answer := kernel.supports(site, target), Supported)
        ]
        if site.q_len == 1 and whole:
            return Supported(_CALL + min(whole) / 2)
        device = target.device
        dtype = site.dtype if device.supports(site.dtype) else "float32"
        vectors = extent(site.heads) * extent(site.q_len) + extent(site.kv_heads) * extent(site.kv_len)
        moved = extent(site.batch) * vectors * site.head_dim * element_bytes(site.dtype)
        return Supported(_CALL + self.search(site) / (GEMM * device.peak(dtype)) + moved / device.memory_bandwidth)

    def apply(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the selector and attention over its map, under the site's own predicate."""
        call = AttentionCall.of(node)
        assert call.keep is not None, f"{self.name} was applied to a mask that is not proved"
        loads, sizes, keep = list(call.loads), list(call.sizes), to_json(call.keep)
        chosen = self.map(call, (call.q, call.k, loads, sizes, keep), site, edit)
        operands = (call.q, call.k, call.v, chosen, loads, sizes, keep, call.empty_row, call.scale)
        return edit.call(torch.ops.eff.attention_blocks_v1.default, *operands, *self.blocks(site), like=node)


def products(site: AttentionSite, queries: float, keys: float, width: float) -> float:
    """Return the FLOP of `queries` x `keys` scores with vectors of `width`, for all heads; half of them under causal order."""
    assert isinstance(site.mask, Mask)
    rows, columns = extent(site.q_len), extent(site.kv_len)
    share = visited(site.mask.keep, rows, columns, (max(1, rows // 16), max(1, columns // 16)))
    return 2.0 * extent(site.batch) * extent(site.heads) * queries * keys * width * share


def _why_not(found: list[tuple[Any, Any]], target: Target) -> Refusal:
    """Return the reason of the one kernel that is for this kind of device, or that there is none."""
    reasons = [answer for _, answer in found if answer.code not in ("EFF-A205", "EFF-A209")]
    if reasons:
        return reasons[0]  # type: ignore[no-any-return]
    told = "; ".join(f"{kernel.name}: {answer.reason}" for kernel, answer in found)
    return Refusal(
        "EFF-A505", f"no kernel on {target} runs attention over a map of blocks" + (f" ({told})" if told else "")
    )
