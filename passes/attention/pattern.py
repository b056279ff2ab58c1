"""Hold what policies of the family AttentionPattern have in common: the refusals that they share, and static patterns."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.density import extent, pairs
from effcompile.core.expr import KEY, QUERY, Expr, apply, axis, const, walk
from effcompile.core.expr_eval import to_json
from effcompile.core.kernel import Supported
from effcompile.core.mask import Mask
from effcompile.core.narrow import Alignment, align, narrow
from effcompile.core.policy import DENSE_LAYER, Estimate, Exactness, Kernels, Policy, Proposal, check_whole
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target


@dataclass(frozen=True)
class AttentionPattern(Policy):
    """Choose which keys each query reads. The first `dense_layers` layers stay as they are."""

    dense_layers: int = 0

    family: ClassVar[str] = "attention"
    exactness: ClassVar[Exactness] = "lossy"

    def __post_init__(self) -> None:
        check_whole(self, "dense_layers")

    def propose(self, site: AttentionSite, target: Target, kernels: Kernels) -> Proposal:
        """Refuse dense layers and masks that cannot be narrowed, then ask the pattern itself."""
        if site.layer < self.dense_layers:
            return Refusal(DENSE_LAYER, f"layer {site.layer} is one of the first {self.dense_layers}, which stay dense")
        if not isinstance(site.mask, Mask):
            return Refusal("EFF-A103", f"the mask is opaque: {site.mask.reason}")
        return self.estimate(site, target, kernels)

    def settled(self) -> Policy:
        """Return the pattern without `dense_layers`."""
        return replace(self, dense_layers=0)

    @abstractmethod
    def estimate(self, site: AttentionSite, target: Target, kernels: Kernels) -> Proposal:
        """Return what the pattern would do at a site whose mask is proved, or why it cannot."""


@dataclass(frozen=True)
class StaticPattern(AttentionPattern):
    """Narrow the predicate by a pattern that is known when the model is compiled; exact kernels run the result."""

    differentiable: ClassVar[bool] = True

    @property
    @abstractmethod
    def sink(self) -> bool:
        """Tell whether the pattern keeps key 0 for every query."""

    @property
    @abstractmethod
    def reach(self) -> int:
        """Return how many keys a query keeps at most, on one side."""

    @abstractmethod
    def pattern(self, at: Alignment) -> Expr:
        """Return the predicate to intersect with; it contains each query's own key."""

    def estimate(self, site: AttentionSite, target: Target, kernels: Kernels) -> Proposal:
        """Refuse cross attention and short sites; else the price is that of the fastest exact kernel on the narrowed mask."""
        at = align(site)
        if isinstance(at, Refusal):
            return at
        if isinstance(site.kv_len, int) and site.kv_len <= self.reach:
            return Refusal("EFF-A502", f"too short: {site.kv_len} keys, and the pattern keeps {self.reach}")
        after = self.narrowed(site)
        assert isinstance(site.mask, Mask)
        assert isinstance(after.mask, Mask)
        density = self._density(site.mask, at, extent(site.q_len), extent(site.kv_len))
        if density >= 1 and isinstance(site.kv_len, int):
            return Refusal("EFF-A502", f"the mask {site.mask} keeps nothing outside the pattern")
        answers = [kernel.supports(after, target) for kernel in kernels.exact]
        able = [answer for answer in answers if isinstance(answer, Supported)]
        if not able:
            return Refusal("EFF-A505", f"no kernel on {target} runs the narrowed mask")
        best = min(able, key=lambda answer: answer.seconds)
        return Estimate(best.seconds, density, best.tag)

    def _density(self, mask: Mask, at: Alignment, rows: int, columns: int) -> float:
        """Return kept over allowed pairs; where own keys are data, as if the queries were the last positions."""
        own = at.own
        if any(node.op in ("load", "size") for node in walk(own)):
            own = apply("add", axis(QUERY), const(columns - rows))
        allowed = apply("and", mask.keep, apply("le", axis(KEY), own)) if at.causal else mask.keep
        whole = pairs(allowed, rows, columns)
        return pairs(apply("and", allowed, self.pattern(replace(at, own=own))), rows, columns) / whole if whole else 1.0

    def gradient(self, site: AttentionSite) -> Refusal | None:
        """Refuse score addends: the mask tensor is made anew, and a trained bias would get no gradient through it."""
        if isinstance(site.mask, Mask) and site.mask.bias is not None:
            return Refusal("EFF-A301", "no gradient flows to a score addend", "run inference under torch.no_grad()")
        return None

    def narrowed(self, site: AttentionSite) -> AttentionSite:
        """Return the site with the narrowed mask; slots of new size operands follow those that the mask reads."""
        return self._narrowed(site, None)[0]

    def _narrowed(self, site: AttentionSite, slots: int | None) -> tuple[AttentionSite, Alignment]:
        at = align(site, slots)
        assert isinstance(at, Alignment), f"{self.name} was applied to a site that it refuses: {at}"
        assert isinstance(site.mask, Mask)
        return replace(site, mask=narrow(site.mask, self.pattern(at), at, sink=self.sink)), at

    def apply(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the same op with the narrowed predicate, and with the mask tensor that goes with it."""
        call = AttentionCall.of(node)
        after, at = self._narrowed(site, len(call.sizes))
        mask = after.mask
        assert isinstance(mask, Mask)
        sizes = list(call.sizes)
        shapes = (call.q.meta["val"].shape, call.k.meta["val"].shape)
        if at.fresh is not None and any(part == at.k_len for part in walk(mask.keep)):
            sizes.append(edit.size(shapes[1][2]))
        keep = to_json(mask.keep)
        extents = [edit.size(n) for n in (*shapes[0][:3], shapes[1][2])]
        bias, soft = (to_json(part) if part is not None else "" for part in (mask.bias, mask.soft))
        loads = list(call.loads)
        operands = (loads, sizes, keep, bias, soft, mask.empty_row, *extents, call.q.meta["val"].device)
        # A kernel that reads the predicate leaves the tensor unused, and then it is never built.
        key = ("mask-tensor", str(operands))
        needed = (*loads, *sizes, *extents)
        tensor = edit.shared(key, needed, lambda: edit.call(torch.ops.eff.mask_tensor_v1.default, *operands))
        values = (call.q, call.k, call.v, tensor, call.sinks, loads, sizes, keep, bias, soft, mask.empty_row)
        return edit.call(torch.ops.eff.attention_v1.default, *values, call.scale, call.softcap, like=node)
