"""Define `eff::attention_ordered_v1`: attention over a map of blocks of tokens that each head has put in an order of its own.

Attention does not depend on the order of its tokens, so tokens that belong together can be brought together before blocks are
chosen: those of one place in all frames of a video (arXiv:2502.01776), or of one cluster (arXiv:2505.18875). The result is in the
order of the queries as they came. The C++ kernel reads through the orders; elsewhere tokens are copied.
"""

from __future__ import annotations

import math

import torch

from effcompile.core.expr import TRUE
from effcompile.core.expr_eval import to_json
from effcompile.ops import native
from effcompile.ops.attention import define
from effcompile.ops.attention_blocks import compiled, revive

NAME = "eff::attention_ordered_v1"
_EVERYTHING = to_json(TRUE)


def attention_ordered(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_order: torch.Tensor,
    k_order: torch.Tensor,
    chosen: torch.Tensor,
    scale: float,
    q_block: int,
    k_block: int,
) -> torch.Tensor:
    """Compute attention over the chosen blocks of the ordered tokens, without a mask.

    q `[B, H, Q, D]`, k `[B, H, K, D]`, v `[B, H, K, Dv]`; orders int64 `[B, H, Q]` and `[B, H, K]` say which token stands at each
    place; chosen `[B|1, H', Qb, Kb]` bool, over places. Returns `[B, H, Q, Dv]`.
    """
    if native.runs(native.BLOCKS, q, k, v):
        rest: tuple[list[torch.Tensor], list[int], str] = ([], [], _EVERYTHING)
        found, lse = compiled(q, k, v, chosen, *rest, scale, q_block, k_block, orders=(q_order, k_order))
        dead = lse == -math.inf
        if bool(dead.any()):
            revive(found, dead, q, k, v, *rest, "zero", scale)
        return found
    queries, keys, values = _ordered(q, q_order), _ordered(k, k_order), _ordered(v, k_order)
    none: list[torch.Tensor] = []
    out = torch.ops.eff.attention_blocks_v1(
        queries, keys, values, chosen, none, [], _EVERYTHING, "zero", scale, q_block, k_block
    )
    return torch.empty_like(out).scatter_(2, q_order[..., None].expand_as(out), out)


def _ordered(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3]))


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object) -> torch.Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def register() -> None:
    """Register the op, once."""
    define(
        NAME,
        "(Tensor q, Tensor k, Tensor v, Tensor q_order, Tensor k_order, Tensor chosen, float scale, int q_block, int k_block)"
        " -> Tensor",
        attention_ordered,
        _fake,
    )
