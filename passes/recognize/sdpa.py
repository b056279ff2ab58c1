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
from effcompile.passes.recognize.match import Match, NoMatch, Operand, Term


def match_sdpa(node: fx.Node) -> Match | NoMatch | None:
    """Return the attention that an SDPA node computes, or why it stays."""
    if op_name(node) != "scaled_dot_product_attention":
        return None
    call = normalize_function(node.target, node.args, node.kwargs, normalize_to_only_use_kwargs=True)  # type: ignore[arg-type]
    assert call is not None
    given: dict[str, Any] = call.kwargs
    q, k, v = given["query"], given["key"], given["value"]
    if given.get("dropout_p", 0.0):
        return _refused(node, "EFF-A102", f"dropout {given['dropout_p']} is active", "call model.eval()")
    shape = q.meta["val"].shape
    if len(shape) != 4 or len(k.meta["val"].shape) != 4:
        return _refused(node, "EFF-A105", f"query of rank {len(shape)}", "use [B, H, S, D]")
    if q.meta["val"].is_nested:
        return _refused(node, "EFF-A105", "nested tensors", "")
    scale = given.get("scale")
    if scale is not None and not isinstance(scale, int | float):
        return _refused(node, "EFF-A106", "the scale is computed in the graph", "")
    mask = given.get("attn_mask")
    terms = () if mask is None else (Term("keep" if mask.meta["val"].dtype == torch.bool else "add", mask, -math.inf),)
    plain_k, plain_v = unrepeated(k), unrepeated(v)
    if plain_k is None or plain_v is None or not _same_heads(plain_k, plain_v):
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
    )


def _node(node: fx.Node) -> Operand:
    def build(edit: Editor) -> fx.Node:
        return node

    return build


def _refused(node: fx.Node, code: str, reason: str, hint: str) -> NoMatch:
    return NoMatch(node, "sdpa", Refusal(code, reason, hint))


def _same_heads(a: fx.Node, b: fx.Node) -> bool:
    return bool(a.meta["val"].shape[1] == b.meta["val"].shape[1])


def unrepeated(node: fx.Node) -> fx.Node | None:
    """Return the `[B, Hkv, S, D]` value that `node` repeats to `[B, Hq, S, D]`, `node` itself where nothing is repeated.

    Understood: unsqueeze(2) - expand - reshape (transformers' repeat_kv), and repeat_interleave on dimension 1.
    """
    name = op_name(node)
    if name in ("repeat_interleave",) and len(node.args) > 2 and isinstance(node.args[1], int) and node.args[2] == 1:
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    if name not in ("reshape", "view", "_unsafe_view", "clone", "contiguous", "flatten"):
        return node
    inner = node.args[0]
    if name in ("clone", "contiguous"):
        assert isinstance(inner, fx.Node)
        found = unrepeated(inner)
        return node if found is inner else found
    if not isinstance(inner, fx.Node):
        return node
    while op_name(inner) in ("clone", "contiguous") and isinstance(inner.args[0], fx.Node):
        inner = inner.args[0]
    if op_name(inner) != "expand" or not isinstance(inner.args[0], fx.Node):
        return node
    source, wide = inner.args[0], inner.meta["val"]
    if op_name(source) != "unsqueeze" or source.args[1] not in (2, -3) or wide.dim() != 5:
        return node
    base = source.args[0]
    assert isinstance(base, fx.Node)
    narrow, out = base.meta["val"], node.meta["val"]
    if out.dim() != 4 or narrow.dim() != 4 or int(out.shape[1]) != int(wide.shape[1]) * int(wide.shape[2]):
        return node
    if int(narrow.shape[1]) != int(wide.shape[1]):
        return node
    return base
