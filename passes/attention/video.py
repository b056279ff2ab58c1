"""Hold what patterns for the tokens of a video have in common: their orders, and attention over blocks of ordered tokens."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.mask import Mask
from effcompile.core.policy import Kernels, Proposal, check_whole
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.passes.attention.dynamic import DynamicPattern


def place_major(tokens: int, text: int, frames: int, device: torch.device) -> Tensor:
    """Return the order `[N]` in which text comes first and then, for each place of a frame, the tokens of all frames."""
    places = (tokens - text) // frames
    video = torch.arange(frames * places, device=device).view(frames, places).t().reshape(-1)
    return torch.cat((torch.arange(text, device=device), video + text))


@dataclass(frozen=True)
class OrderedPattern(DynamicPattern):
    """Put tokens into an order of their own in each head, then choose blocks; attention without a mask only."""

    block: int = 64

    op: ClassVar[str] = "eff::attention_ordered_v1"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "block", least=16, multiple=16)

    def blocks(self, site: AttentionSite) -> tuple[int, int]:
        """Return the block twice."""
        return self.block, self.block

    @abstractmethod
    def orders(self, call: AttentionCall, edit: Editor) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Insert what gives (order of the queries, order of the keys, map of blocks)."""

    def estimate(self, site: AttentionSite, target: Target, kernels: Kernels) -> Proposal:
        """Refuse masks, which an order of tokens would break, and sizes that are not known."""
        if site.cross or str(site.q_len) != str(site.kv_len):
            return Refusal("EFF-A504", f"{site.q_len} queries and {site.kv_len} keys are not the tokens of a video")
        if not isinstance(site.mask, Mask) or not site.mask.is_full or site.mask.bias is not None:
            return Refusal("EFF-A504", f"tokens in another order have no mask `{site.mask}`")
        if not isinstance(site.kv_len, int):
            return Refusal("EFF-A504", "the orders need lengths that are known", "dynamic=False")
        if site.heads != site.kv_heads:
            return Refusal("EFF-A507", f"{site.heads} query heads and {site.kv_heads} key heads have no common order")
        return super().estimate(site, target, kernels)

    def choose(self, call: AttentionCall, head: tuple[Any, ...], site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the orders and attention over them."""
        operands = (call.q, call.k, call.v, *self.orders(call, edit), call.scale, *self.blocks(site))
        return edit.call(torch.ops.eff.attention_ordered_v1.default, *operands, like=call.node)

    def apply(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the op as a whole: it has no predicate."""
        return self.choose(AttentionCall.of(node), (), site, edit)
