"""Carry the mask of an attention over to fewer tokens: positions are looked up, padding is shortened, merged tokens weigh more."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.expr import BATCH, BOOL, INT, KEY, QUERY, TRUE, Expr, apply, axes_of, axis, const, load, walk
from effcompile.core.expr_eval import evaluate, to_json
from effcompile.core.mask import Mask, causal_offset, substitute
from effcompile.core.rewrite import Editor

_B, _Q, _K = axis(BATCH), axis(QUERY), axis(KEY)


def parts_of(keep: Expr | None) -> tuple[Expr, ...]:
    """Return the conditions that must all hold."""
    if keep is None or keep == TRUE:
        return ()
    return keep.args if keep.op == "and" else (keep,)


def of_keys(keep: Expr | None) -> tuple[Expr, ...]:
    """Return the conditions on keys alone: padding."""
    return tuple(part for part in parts_of(keep) if axes_of(part) <= {BATCH, KEY})


def narrowed(mask: Mask, sized: bool) -> Mask:
    """Return a mask as kernels see it over fewer tokens, with slots of its own; `sized` where tokens were merged."""
    slot = 1 + max(
        (
            int(n.value or 0)
            for e in (mask.keep, mask.bias, mask.soft)
            if e is not None
            for n in walk(e)
            if n.op == "load"
        ),
        default=-1,
    )
    keep = moved(mask.keep, slot, slot + 1)
    bias = None if mask.bias is None else at_positions(mask.bias, slot)
    return Mask(keep, weighed(bias, slot + 2) if sized else bias, mask.fill, mask.empty_row, TRUE)


def moved(keep: Expr, positions: int, real: int) -> Expr:
    """Return a predicate over the tokens that are left: `positions` and `real` are slots of tensors `[B, N]`."""
    parts, padded = [], False
    for part in parts_of(keep):
        if axes_of(part) <= {BATCH, KEY}:
            padded = True
        else:
            parts.append(at_positions(part, positions))
    if padded:
        parts.append(load(real, (_B, _K), BOOL))
    return apply("and", *parts) if len(parts) > 1 else parts[0] if parts else TRUE


def at_positions(part: Expr, slot: int) -> Expr:
    """Look up the positions of query and key; causal order needs none, since tokens keep their order."""
    if causal_offset(part) == const(0):
        return part
    out = substitute(part, _Q, load(slot, (_B, _Q), INT))
    return _keys_once(out, slot)


def _keys_once(expr: Expr, slot: int) -> Expr:
    """Replace the key index, but not within the looked-up position of the query."""
    key = load(slot, (_B, _K), INT)
    query = load(slot, (_B, _Q), INT)

    def walk_down(node: Expr) -> Expr:
        if node == query:
            return node
        if node == _K:
            return key
        if not node.args:
            return node
        args = tuple(map(walk_down, node.args))
        if node.op == "load":
            return Expr("load", args, node.value, node.dtype)
        return apply(node.op, *args, dtype=node.dtype)

    return walk_down(expr)


def for_queries(part: Expr, slot: int) -> Expr:
    """Look up the positions of queries alone: keys are those of another sequence."""
    return substitute(part, _Q, load(slot, (_B, _Q), INT))


def weighed(bias: Expr | None, slot: int) -> Expr:
    """Add the logarithm of how many tokens each key stands for."""
    size = load(slot, (_B, _K), torch.float32)
    return size if bias is None else apply("add", bias, size)


def real_tokens(edit: Editor, call: AttentionCall, batch: Any, tokens: int) -> fx.Node | None:
    """Insert which tokens are no padding, `[B, N]` bool; None where all are."""
    parts = of_keys(call.keep)
    if not parts:
        return None
    keep = apply("and", *parts) if len(parts) > 1 else parts[0]
    device = call.q.meta["val"].device
    count = len(call.loads)

    def values(rows: Any, *operands: Any) -> torch.Tensor:
        one = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
        axes = (
            torch.arange(rows, device=device).reshape(-1, 1, 1, 1),
            one,
            one,
            torch.arange(tokens, device=device).reshape(1, 1, 1, -1),
        )
        found = evaluate(keep, axes, operands[:count], operands[count:])
        return found.expand(rows, 1, 1, tokens).reshape(rows, tokens)

    operands = (edit.size(batch), *call.loads, *call.sizes)
    return edit.shared(("real-tokens", to_json(keep), *operands), operands, lambda: edit.inline(values, *operands))
