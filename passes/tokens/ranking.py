"""Rank tokens by the attention that they get: what the policies that drop tokens share."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from effcompile.core.expr import TRUE
from effcompile.core.expr_eval import to_json
from effcompile.core.mask import Mask
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.tokens import Kept, Step
from effcompile.ops.tokens.choice import keep_top
from effcompile.ops.tokens.mass import written

aten = torch.ops.aten


def unreadable(site: AttentionSite) -> Refusal | None:
    """Return why the attention that a token gets cannot be computed from queries, keys and predicate, else None."""
    if not isinstance(site.mask, Mask):
        return Refusal("EFF-R106", f"the mask is opaque: {site.mask.reason}")
    if site.mask.bias is not None or site.softcap or site.sinks:
        what = "softcap" if site.softcap else "sink logits" if site.sinks else "a score addend"
        return Refusal("EFF-R106", f"{what}: scores are not those of queries and keys alone")
    return None


def mass(step: Step, rows: fx.Node | None = None) -> fx.Node:
    """Insert the attention that each token gets, `[B, N]`, from `rows` `[B, R]` or from all."""
    call, edit = step.call, step.edit
    keep = to_json(TRUE if call.keep is None else call.keep)
    if not step.portable:
        operands = (call.q, call.k, rows, list(call.loads), list(call.sizes), keep, call.scale)
        return edit.call(torch.ops.eff.token_mass_v1.default, *operands)
    count = len(call.loads)

    def plain(q: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
        where = rest[-1] if rows is not None else None
        return written(q, k, where, rest[:count], rest[count : count + len(call.sizes)], keep, call.scale)  # type: ignore[arg-type]

    return edit.inline(plain, call.q, call.k, *call.loads, *call.sizes, *([] if rows is None else [rows]))


def last_row(step: Step) -> fx.Node:
    """Insert the place of the last real token of each sequence, `[B, 1]`."""
    batch, device = step.edit.size(step.call.q.meta["val"].shape[0]), step.call.q.meta["val"].device
    if step.real is None:
        return step.edit.call(aten.full.default, [batch, 1], step.tokens - 1, dtype=torch.int64, device=device)

    def last(real: Tensor) -> Tensor:
        places = torch.arange(real.shape[1], device=real.device)
        return torch.where(real, places, 0).amax(-1, keepdim=True)

    return step.edit.inline(last, step.real)


def first_row(step: Step) -> fx.Node:
    """Insert the place of the first token of each sequence, `[B, 1]`."""
    batch, device = step.edit.size(step.call.q.meta["val"].shape[0]), step.call.q.meta["val"].device
    return step.edit.call(aten.zeros.default, [batch, 1], dtype=torch.int64, device=device)


def keep_best(step: Step, scores: fx.Node, count: int | None = None) -> fx.Node:
    """Insert the choice of the `count` tokens of the largest scores `[B, N]`; pinned tokens first, padding last."""
    given = [node for node in (step.held, step.real) if node is not None]
    left = step.left if count is None else count
    has_held, has_real, stable = step.held is not None, step.real is not None, not step.portable

    def chosen(values: Tensor, *rest: Tensor) -> Tensor:
        held = rest[0] if has_held else None
        real = rest[-1] if has_real else None
        return keep_top(values, held, real, left, stable)

    return step.edit.inline(chosen, scores, *given)


def drop(step: Step, scores: fx.Node) -> Kept:
    """Insert the choice of tokens to drop."""
    return Kept(keep_best(step, scores))
