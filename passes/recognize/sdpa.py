"""Recognize `scaled_dot_product_attention` in every call form: positional, keyword, masked, scaled, causal, grouped.

Copies that repeat key/value heads (`repeat_kv`) are looked through, so that grouped-query attention stays grouped.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.fx.operator_schemas import normalize_function

from effcompile.core.rewrite import Editor
from effcompile.core.site import Refusal
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.match import Match, NoMatch, Operand, Term, attends, same_size


def match_sdpa(node: fx.Node, grouped: bool = True) -> Match | NoMatch | None:
    """Return the attention that an SDPA node computes, or why it stays; `grouped` looks through repeated key/value heads."""
    if op_name(node) != "scaled_dot_product_attention":
        return None
    call = normalize_function(node.target, node.args, node.kwargs, normalize_to_only_use_kwargs=True)  # type: ignore[arg-type]
    assert call is not None
    given: dict[str, Any] = call.kwargs
    q, k, v = given["query"], given["key"], given["value"]
    if given.get("dropout_p", 0.0):
        return _refused(node, "EFF-A102", f"dropout {given['dropout_p']} is active", "call model.eval()")
    shape = q.meta["val"].shape
    if len(shape) != 4 or len(k.meta["val"].shape) != 4 or len(v.meta["val"].shape) != 4:
        return _refused(node, "EFF-A105", f"query of rank {len(shape)}", "use [B, H, S, D]")
    if q.meta["val"].is_nested:
        return _refused(node, "EFF-A105", "nested tensors", "")
    scale = given.get("scale")
    if scale is not None and not isinstance(scale, int | float):
        return _refused(node, "EFF-A106", "the scale is computed in the graph", "")
    if not attends(q.meta["val"], k.meta["val"], v.meta["val"], bool(given.get("enable_gqa"))):
        return _refused(node, "EFF-A105", "query, key and value are broadcast against each other", "expand them")
    mask = given.get("attn_mask")
    if mask is not None and mask.meta["val"].dim() > 4:
        return _refused(node, "EFF-A105", f"a mask of rank {mask.meta['val'].dim()}", "")
    terms = () if mask is None else (Term("keep" if mask.meta["val"].dtype == torch.bool else "add", mask, -math.inf),)
    plain_k, plain_v = (unrepeated(k), unrepeated(v)) if grouped else (k, v)
    if not attends(q.meta["val"], plain_k.meta["val"], plain_v.meta["val"]):
        plain_k, plain_v = k, v
    return Match(
        idiom="sdpa" + ("" if plain_k is k else "+repeat_kv"),
        anchor=node,
        q=_node(q),
        k=_node(plain_k),
        v=_node(plain_v),
        terms=terms,
        causal=bool(given.get("is_causal", False)),
        scale=float(scale) if scale is not None else 1.0 / math.sqrt(int(shape[-1])),
        reads=() if plain_k is k else ((plain_k, k), (plain_v, v)),
    )


def _node(node: fx.Node) -> Operand:
    def build(edit: Editor) -> fx.Node:
        return node

    return build


def _refused(node: fx.Node, code: str, reason: str, hint: str) -> NoMatch:
    return NoMatch(node, "sdpa", Refusal(code, reason, hint))


def unrepeated(node: fx.Node) -> fx.Node:
    """Return the `[B, Hkv, S, D]` value that `node` repeats to `[B, Hq, S, D]`, `node` itself where nothing is repeated.

    Understood: unsqueeze(2) - expand - reshape (transformers' repeat_kv), and repeat_interleave on dimension 1.
    """
    out = node
    while op_name(node) in ("clone", "contiguous") and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return out
    if op_name(node) == "repeat_interleave" and len(node.args) > 2 and isinstance(node.args[1], int):
        return source if node.args[2] in (1, -3) and source.meta["val"].dim() == 4 else out
    if op_name(node) not in ("reshape", "view", "_unsafe_view", "flatten"):
        return out
    while op_name(source) in ("clone", "contiguous") and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    base = source.args[0].args[0] if op_name(source) == "expand" and _is_split_of(source.args[0]) else None  # type: ignore[union-attr]
    if not isinstance(base, fx.Node) or base.meta["val"].dim() != 4 or node.meta["val"].dim() != 4:
        return out
    batch, heads, length, width = base.meta["val"].shape
    group = source.meta["val"].shape[2]
    wide, flat = (batch, heads, group, length, width), (batch, heads * group, length, width)
    return base if _shaped(source, wide) and _shaped(node, flat) else out


def _is_split_of(node: object) -> bool:
    return isinstance(node, fx.Node) and op_name(node) == "unsqueeze" and node.args[1] in (2, -3)


def _shaped(node: fx.Node, sizes: tuple[Any, ...]) -> bool:
    shape = node.meta["val"].shape
    return len(shape) == len(sizes) and all(map(same_size, shape, sizes))
