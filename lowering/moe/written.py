"""Write a dispatch out as operations of the graph: what batched, dense and grouped products have in common."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx

from effcompile.core.experts import ExpertsCall
from effcompile.core.rewrite import Editor

Body = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None, ExpertsCall[fx.Node]], Tensor]
"""x `[T, H]`, ids and weights `[T, k]`, w1, b1, w2, b2 as in `eff::moe_v1`, and the call with its gate; returns `[T, H]`."""


def write_out(node: fx.Node, edit: Editor, body: Body) -> fx.Node:
    """Insert the operations of `body` on the operands of an `eff::moe_v1` node, and return the node of the result."""
    call = ExpertsCall.of(node)
    operands = [call.x, call.ids, call.weights, call.w1, call.w2, *(b for b in (call.b1, call.b2) if b is not None)]
    biased = call.b1 is not None, call.b2 is not None

    def written(x: Tensor, ids: Tensor, share: Tensor, w1: Tensor, w2: Tensor, *biases: Tensor) -> Tensor:
        given = iter(biases)
        b1, b2 = (next(given) if there else None for there in biased)
        return body(x, ids, share, w1, b1, w2, b2, call)

    return edit.inline(written, *operands)
