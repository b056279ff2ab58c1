"""Let only the tokens that matter attend to each other (ZipVL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.density import extent
from effcompile.core.expr_eval import to_json
from effcompile.core.policy import Kernels, Proposal, check_share, check_whole
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.passes.attention.dynamic import DynamicPattern

ASSUMED = 0.5
"""Price the default mass at this share of tokens; the true one is data."""


@dataclass(frozen=True)
class ZipVL(DynamicPattern):
    """Keep the tokens that hold `mass` of what `recent` last and `spread` other rows read, at least a share of `floor`, in prefill.

    What is kept attends to itself; a dropped token gets 0 from this layer and lives on in the residual stream. How many are kept is
    each layer's own. This is the prefill of the paper; its quantization of the cache is not here.
    """

    mass: float = 0.97
    recent: int = 64
    spread: int = 64
    floor: float = 0.1

    name: ClassVar[str] = "zipvl"
    paper: ClassVar[str] = "arXiv:2410.08584"
    op: ClassVar[str] = "eff::attention_tokens_v1"
    ordered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "mass")
        check_share(self, "floor")
        check_whole(self, "recent", least=1)
        check_whole(self, "spread")

    def blocks(self, site: AttentionSite) -> tuple[int, int]:
        """Return single tokens."""
        return 1, 1

    def least(self, site: AttentionSite) -> int:
        """Return the number of probe rows: below it the choice costs as much as attention."""
        return self.recent + self.spread

    def expected(self, site: AttentionSite) -> float:
        """Return the square of the share of tokens that is assumed, or everything."""
        return 1.0 if self.mass >= 1 else max(ASSUMED, float(self.floor)) ** 2

    def search(self, site: AttentionSite) -> float:
        """Return the FLOP of the probe rows' scores."""
        rows = min(self.recent + self.spread, extent(site.q_len))
        return 2.0 * extent(site.batch) * extent(site.heads) * rows * extent(site.kv_len) * site.head_dim

    def choose(self, call: AttentionCall, head: tuple[Any, ...], site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert the op as a whole: tokens are chosen inside."""
        settings = (float(self.mass), self.recent, self.spread, float(self.floor))
        operands = (call.q, call.k, call.v, *head[2:], call.empty_row, call.scale)
        return edit.call(torch.ops.eff.attention_tokens_v1.default, *operands, *settings, like=call.node)

    def apply(self, node: fx.Node, site: AttentionSite, edit: Editor) -> fx.Node:
        """Insert `eff::attention_tokens_v1` under the site's own predicate."""
        call = AttentionCall.of(node)
        assert call.keep is not None, f"{self.name} was applied to a mask that is not proved"
        return self.choose(call, (call.q, call.k, list(call.loads), list(call.sizes), to_json(call.keep)), site, edit)

    def estimate(self, site: AttentionSite, target: Target, kernels: Kernels) -> Proposal:
        """Refuse unequal lengths as well: a token is a query and a key."""
        if site.q_len != 1 and str(site.q_len) != str(site.kv_len):
            return Refusal("EFF-A504", f"{site.q_len} queries and {site.kv_len} keys: tokens are both")
        return super().estimate(site, target, kernels)
