"""Rewrite attention for a phase of Re-ttention in standard operations: its state comes as inputs and goes as outputs.

A runtime that knows no kernel of ours runs this (ONNX, TensorRT). The band is not a mask over all pairs, which would save nothing:
places go in groups, and each group multiplies with the places around it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.core.attention_call import AttentionCall
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, copy_graph
from effcompile.core.site import AttentionSite
from effcompile.core.verify import CARRIED
from effcompile.passes.attention.re_ttention import ReTtention
from effcompile.passes.attention.replay import Residual, add_inputs
from effcompile.passes.attention.video import place_major

Carrying = Literal["refresh", "sparse"]
GROUP = 64
"""Tokens that a group has at least."""


def replay_portable(
    program: Program, sites: Sequence[AttentionSite], policy: ReTtention, phase: Carrying
) -> tuple[Program, tuple[Residual, ...]]:
    """Return the program with these sites as the phase computes them, and what they carry.

    A refresh returns rho and residual of each site, in turn, behind the program's own results; a dense step is a refresh whose
    state nobody reads. A sparse step takes them behind the program's own inputs, and returns each rho anew.
    """
    chosen = {site.id: site for site in sites}
    (entry,) = program.entries
    edit, inputs = Editor(copy_graph(entry.graph)), list(entry.inputs)
    carried: list[Residual] = []
    results: list[Any] = []
    made: Callable[..., Any]
    for node in list(edit.graph.nodes):
        site = chosen.get(node.meta.get("eff.site", ""))
        if site is None or node.target is not torch.ops.eff.attention_v1.default:
            continue
        value, call = node.meta["val"], AttentionCall.of(node)
        one = Residual(site.id, tuple(value.shape[:3]), tuple(value.shape), value.dtype)
        given: tuple[Any, ...] = (call.q, call.k, call.v)
        if phase == "refresh":
            made = partial(refresh, policy=policy, scale=call.scale)
        else:
            state = add_inputs(edit, inputs, one, value)
            given = (*given, state["rho"], state["residual"])
            made = partial(sparse, policy=policy, scale=call.scale)
        with edit.before(node):
            out, *kept = edit.inline_all(made, *given)
        edit.replace(node, out)
        for result in kept:
            result.meta[CARRIED] = True
        carried.append(one)
        results += kept
    ends = next(iter(edit.graph.find_nodes(op="output")))
    ends.args = ((*ends.args[0], *results),)
    changed = replace(entry, graph=edit.finish(), inputs=tuple(inputs))
    return replace(program, entries=(changed,)), tuple(carried)


def refresh(q: Tensor, k: Tensor, v: Tensor, policy: ReTtention, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (attention over all keys `[B, H, N, Dv]`, rho `[B, H, N]` float32, residual `[B, H, N, Dv]`).

    Tokens of rho and residual are in the order of the policy.
    """
    order = _order(q, policy)
    q, k, v = (x if order is None else x.index_select(2, order) for x in (q, k, v))
    narrow, part = _band(q, k, v, policy, scale)
    found, whole = dense(q, k, v, scale)
    rho = (part - whole).exp().clamp(max=1)
    return _back(found.to(q.dtype), order), rho, (found - rho[..., None] * narrow).to(v.dtype)


def sparse(
    q: Tensor, k: Tensor, v: Tensor, rho: Tensor, residual: Tensor, policy: ReTtention, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (the band's attention with what was carried, rho that has grown)."""
    order = _order(q, policy)
    q, k, v = (x if order is None else x.index_select(2, order) for x in (q, k, v))
    narrow, _ = _band(q, k, v, policy, scale)
    grown = (rho + policy.growth).clamp(max=1)
    return _back((grown[..., None] * narrow + residual).to(q.dtype), order), grown


def _order(q: Tensor, policy: ReTtention) -> Tensor | None:
    return place_major(q.shape[2], policy.text, policy.frames, q.device) if policy.frames else None


def _back(out: Tensor, order: Tensor | None) -> Tensor:
    return out if order is None else out.index_select(2, order.argsort())


def _band(q: Tensor, k: Tensor, v: Tensor, policy: ReTtention, scale: float) -> tuple[Tensor, Tensor]:
    return banded(q, k, v, scale, policy.half(q.shape[2]), policy.text, max(1, policy.frames))


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return attention over all keys and its LSE in float32."""
    return _softmax(torch.matmul(q, k.transpose(-1, -2)).float() * scale, v)


def banded(q: Tensor, k: Tensor, v: Tensor, scale: float, half: int, text: int, unit: int) -> tuple[Tensor, Tensor]:
    """Return attention `[B, H, N, Dv]` in float32 and LSE `[B, H, N]` over text and the places within `half` of a query's own.

    Behind `text` tokens a place is `unit` tokens. Text reads everything.
    """
    places = (q.shape[2] - text) // unit
    size = max(1, -(-GROUP // unit), half)
    groups = -(-places // size)
    tail = groups * size - places
    queries = _placed(q[:, :, text:], unit, 0, tail)
    queries = queries.unflatten(2, (groups, size)).flatten(3, 4)
    device = q.device
    first = torch.arange(groups, device=device)[:, None] * size
    around = (first + torch.arange(size + 2 * half, device=device)).reshape(-1)
    keys, values = (
        _placed(x[:, :, text:], unit, half, half + tail)
        .index_select(2, around)
        .unflatten(2, (groups, size + 2 * half))
        .flatten(3, 4)
        for x in (k, v)
    )
    own = first[:, :, None] + torch.arange(size, device=device)[None, :, None]
    other = around.view(groups, 1, -1) - half
    kept = ((own - other).abs() <= half) & (other >= 0) & (other < places)
    kept = kept.repeat_interleave(unit, 1).repeat_interleave(unit, 2)
    scores = torch.matmul(queries, keys.transpose(-1, -2)).float() * scale
    scores = scores.masked_fill(~kept, torch.finfo(torch.float32).min)
    if text:
        heads = (x[:, :, None, :text].expand(-1, -1, groups, -1, -1) for x in (k, v))
        more, words = heads
        scores = torch.cat((torch.matmul(queries, more.transpose(-1, -2)).float() * scale, scores), -1)
        values = torch.cat((words, values), 3)
    found, lse = _softmax(scores, values)
    out, lse = found.flatten(2, 3)[:, :, : places * unit], lse.flatten(2, 3)[:, :, : places * unit]
    if not text:
        return out, lse
    head, of_head = dense(q[:, :, :text], k, v, scale)
    return torch.cat((head, out), 2), torch.cat((of_head, lse), 2)


def _placed(x: Tensor, unit: int, before: int, behind: int) -> Tensor:
    """Return tokens `[B, H, N, D]` as places `[B, H, P, unit, D]` with empty ones on both sides."""
    return F.pad(x.unflatten(2, (-1, unit)), (0, 0, 0, 0, before, behind))


def _softmax(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    most = scores.amax(-1, keepdim=True)
    weights = (scores - most).exp()
    total = weights.sum(-1, keepdim=True)
    return torch.matmul(weights, values.float()) / total, (total.log() + most).squeeze(-1)
