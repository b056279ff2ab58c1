"""Recognize attention written out: matmul - scale - mask - softmax - dropout - matmul.

The walk starts at the softmax and goes back through pointwise steps until it meets the product of queries and keys. Each step
must be understood, and nothing but the second product may read the probabilities; otherwise the occurrence stays as it is.
Understood products: matmul, bmm, baddbmm, einsum. Softcap (Gemma 2) and sink logits (gpt-oss) are part of the walk.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from effcompile.core.rewrite import Editor
from effcompile.core.site import Refusal
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.match import Match, NoMatch, Operand, Term, same_size
from effcompile.passes.recognize.products import Product, product_of
from effcompile.passes.recognize.sdpa import unrepeated

_VIEWS = ("view", "reshape", "_unsafe_view")
_SAME = ("to", "_to_copy", "contiguous", "clone", "alias")  # not detach: gradients would flow where they do not
_DROPPED = -1e9  # exp(x - max) is 0 in float32 for a score at or below it, whatever attention's scores are


class _Stop(Exception):
    def __init__(self, code: str, reason: str, hint: str = "") -> None:
        self.refusal = Refusal(code, reason, hint)


@dataclass
class _Walk:
    terms: list[Term] = field(default_factory=list)
    scale: float = 1.0
    softcap: float = 0.0
    sinks: fx.Node | None = None
    sinks_reader: fx.Node | None = None
    capped: bool = False
    path: list[fx.Node] = field(default_factory=list)


def match_chain(node: fx.Node) -> Match | NoMatch | None:
    """Return the attention whose softmax is `node`; None where no product of two activations feeds it."""
    if op_name(node) not in ("softmax", "_softmax") or not isinstance(node.args[0], fx.Node):
        return None
    value = node.meta["val"]
    if node.args[1] not in (-1, value.dim() - 1) or value.dim() not in (3, 4):
        return None
    if not _reaches_product(node.args[0]):
        return None
    anchor = node
    try:
        walk = _Walk()
        product = _back(node.args[0], walk)
        walk.path.append(node)
        anchor, values = _forward(node, walk)
        return _assemble(node, product, anchor, values, walk)
    except _Stop as stop:
        return NoMatch(anchor, "softmax-chain", stop.refusal)


# --- from the softmax back to q k^T -----------------------------------------------------------------------------------


def _reaches_product(node: fx.Node, depth: int = 14) -> bool:
    if product_of(node) is not None:
        return True
    if depth == 0 or op_name(node) not in _WALKED:
        return False
    operands = node.args[0] if op_name(node) == "cat" else node.args
    return any(_reaches_product(arg, depth - 1) for arg in operands if isinstance(arg, fx.Node))  # type: ignore[union-attr]


_WALKED = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "masked_fill",
        "where",
        "tanh",
        "cat",
        "maximum",
        "add_",
        "mul_",
        "div_",
        "masked_fill_",
    ]
) | {
    *_VIEWS,
    *_SAME,
}


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    return float(value) if isinstance(value, int | float) else None


def _back(node: fx.Node, walk: _Walk) -> Product:
    """Collect the steps above `node` (latest first) and return the product they start from."""
    walk.path.append(node)
    found = product_of(node)
    if found is not None:
        if found.addend is not None:
            walk.terms.append(Term("add", found.addend, rank3=node.meta["val"].dim() == 3, reader=node))
            if walk.scale != 1.0 or walk.capped:
                raise _Stop("EFF-A104", "the scores are scaled after a bias was added")
        walk.scale *= found.alpha
        return found
    if len(node.users) > 1 and not _shared_by_sinks(node):
        raise _Stop("EFF-A101", "the attention scores are read elsewhere", "drop output_attentions=True")
    name = op_name(node).removesuffix("_")
    args = node.args
    rank3 = node.meta["val"].dim() == 3
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
        raise _Stop("EFF-A106", f"`{name}` between the scores and the softmax is not plain")
    if name in _SAME or name in _VIEWS:
        source = args[0]
        assert isinstance(source, fx.Node)
        if name in _VIEWS and not _only_heads(source, node):
            raise _Stop("EFF-A105", "the scores change shape in an unknown way")
        if name in ("to", "_to_copy") and not node.meta["val"].dtype.is_floating_point:
            raise _Stop("EFF-A105", "the scores are cast to integers")
        return _back(source, walk)
    if name in ("mul", "div"):
        return _back_scaled(node, name, walk)
    if name == "tanh":
        raise _Stop("EFF-A106", "a tanh of the scores that is not a softcap")
    if name == "add":
        path, other = _score_operand(args[0], args[1])
        if walk.scale != 1.0 or walk.capped:
            raise _Stop("EFF-A104", "the scores are scaled or capped after a bias was added")
        if not isinstance(other, fx.Node):
            if walk.sinks is not None or not math.isfinite(_number(other) or 0.0):
                raise _Stop("EFF-A106", "a constant is added to the scores")
            return _back(path, walk)  # softmax ignores a constant
        walk.terms.append(Term("add", other, rank3=rank3, reader=node))
        return _back(path, walk)
    if name == "masked_fill":
        return _back_filled(node, "fill", args[1], args[2], args[0], walk, rank3)
    if name == "where":
        if isinstance(args[1], fx.Node) and _reaches_product(args[1]):
            return _back_filled(node, "keep", args[0], args[2], args[1], walk, rank3)
        return _back_filled(node, "fill", args[0], args[1], args[2], walk, rank3)
    if name in ("sub", "cat"):
        return _back_sinks(node, name, walk)
    raise _Stop("EFF-A106", f"`{name or node.name}` between the scores and the softmax is not known")


def _shared_by_sinks(node: fx.Node) -> bool:
    """Allow the maximum that gpt-oss subtracts: `x - x.max(-1)` leaves the softmax as it is."""
    return all(op_name(user) in ("sub", "amax", "max") for user in node.users)


def _only_heads(source: fx.Node, node: fx.Node) -> bool:
    old, new = source.meta["val"].shape, node.meta["val"].shape
    return len(old) >= 3 and len(new) >= 3 and str(old[-1]) == str(new[-1]) and str(old[-2]) == str(new[-2])


def _score_operand(a: Any, b: Any) -> tuple[fx.Node, Any]:
    first, second = (isinstance(x, fx.Node) and _reaches_product(x) for x in (a, b))
    if first and second:
        raise _Stop("EFF-A106", "two products are added into the scores")
    return (a, b) if first else (b, a)


def _back_scaled(node: fx.Node, name: str, walk: _Walk) -> Product:
    a, b = node.args[0], node.args[1]
    number = _number(b) if isinstance(a, fx.Node) else None
    if number is None and name == "mul" and isinstance(b, fx.Node):
        number, a = _number(a), b
    if number is None:
        number = _constant(b)
    if number is None or not isinstance(a, fx.Node):
        raise _Stop("EFF-A106", "the scores are scaled by a tensor")
    factor = number if name == "mul" else 1.0 / number
    if op_name(a) == "tanh" and not walk.capped:
        inner = a.args[0]
        assert isinstance(inner, fx.Node)
        cap = _softcap(inner, factor)
        if cap is None or walk.scale != 1.0:
            raise _Stop("EFF-A106", "a tanh of the scores that is not a softcap")
        walk.softcap, walk.capped = factor, True
        return _back(cap, walk)
    walk.scale *= factor
    return _back(a, walk)


def _constant(value: Any) -> float | None:
    """Return the number in a 0-dimensional constant (`torch.full([], c)`), which is part of the program, not of its data."""
    if isinstance(value, fx.Node) and op_name(value) in ("full", "scalar_tensor", "lift_fresh_copy"):
        made = value.args[1] if op_name(value) == "full" else value.args[0]
        return _number(made) if value.meta["val"].dim() == 0 else None
    return None


def _softcap(node: fx.Node, cap: float) -> fx.Node | None:
    """Return x where `node` is x / cap."""
    name, args = op_name(node), node.args
    if (name == "div" and _number(args[1]) == cap) or (name == "mul" and _number(args[1]) == 1.0 / cap):
        return args[0] if isinstance(args[0], fx.Node) else None
    return None


def _back_filled(node: fx.Node, kind: Any, cond: Any, fill: Any, path: Any, walk: _Walk, rank3: bool) -> Product:
    number = _number(fill)
    if number is None:
        number = _constant(fill)
    if number is None or not isinstance(cond, fx.Node) or not isinstance(path, fx.Node):
        raise _Stop("EFF-A106", "the scores are filled from a tensor")
    if walk.capped or walk.scale <= 0:
        raise _Stop("EFF-A104", "the scores are scaled or capped after they were masked")
    if not number * walk.scale <= max(_DROPPED, torch.finfo(node.meta["val"].dtype).min):
        raise _Stop("EFF-A106", f"masked scores become {number * walk.scale:g}, which others may not outweigh")
    walk.terms.append(Term(kind, cond, number * walk.scale, rank3, node))
    return _back(path, walk)


def _back_sinks(node: fx.Node, name: str, walk: _Walk) -> Product:
    if name == "sub":
        source, most = node.args[0], node.args[1]
        if isinstance(most, fx.Node) and _is_max_of(most, source) and isinstance(source, fx.Node):
            return _back(source, walk)
        raise _Stop("EFF-A106", "a tensor is subtracted from the scores")
    parts = node.args[0]
    if walk.terms or walk.scale != 1.0 or len(parts) != 2 or (node.args[1] if len(node.args) > 1 else 0) not in (-1, 3):  # type: ignore[arg-type]
        raise _Stop("EFF-A106", "the scores are concatenated with something else")
    scores, sinks = parts  # type: ignore[misc]
    while isinstance(sinks, fx.Node) and op_name(sinks) in ("expand", "reshape", "view", *_SAME):
        if sinks.meta["val"].dim() == 1:
            break
        sinks = sinks.args[0]  # type: ignore[assignment]
    if not isinstance(sinks, fx.Node) or sinks.meta["val"].dim() != 1 or not isinstance(scores, fx.Node):
        raise _Stop("EFF-A106", "the scores are concatenated with something else")
    walk.sinks, walk.sinks_reader = sinks, node
    return _back(scores, walk)


def _is_max_of(node: fx.Node, source: Any) -> bool:
    """Tell whether `node` is the maximum of every row of `source`, kept as a column."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[1] == 0:
        node = node.args[0]
    if op_name(node) not in ("amax", "max") or node.args[0] is not source or len(node.args) != 3:
        return False
    last = source.meta["val"].dim() - 1
    return node.args[1] in (-1, [-1], last, [last]) and node.args[2] is True


# --- from the softmax on to the values ----------------------------------------------------------------------------------


def _forward(node: fx.Node, walk: _Walk) -> tuple[fx.Node, Product]:
    """Follow the probabilities to the second product; any other reader is a refusal."""
    sinks = walk.sinks is not None
    sliced = not sinks
    current = node
    while True:
        users = list(current.users)
        if len(users) != 1 or users[0].op == "output":
            raise _Stop("EFF-A101", "the attention probabilities are read elsewhere", "drop output_attentions=True")
        user = users[0]
        name = op_name(user)
        found = product_of(user)
        if found is not None and found.left is current:
            if not sliced:
                raise _Stop("EFF-A106", "the sink column is not dropped again")
            return user, found
        if name == "dropout":
            if user.args[2] and user.args[1]:
                raise _Stop("EFF-A102", f"dropout {user.args[1]} is active", "call model.eval()")
        elif name == "slice" and sinks and user.args[1] in (-1, 3) and user.args[2] == 0 and user.args[3] == -1:
            sliced = True
        elif not (name in _SAME or (name in _VIEWS and _only_heads(current, user))):
            raise _Stop("EFF-A101", f"the attention probabilities go through `{name or user.name}`")
        walk.path.append(user)
        current = user


def _assemble(node: fx.Node, product: Product, anchor: fx.Node, values: Product, walk: _Walk) -> Match:
    if values.alpha != 1.0 or values.addend is not None or not values.plain_left or product.out_dims != (0, 1, 2, 3):
        raise _Stop("EFF-A106", "the product with the values is not plain")
    scores = node.meta["val"].shape
    rank3: tuple[object, object] | None = None
    if anchor.meta["val"].dim() == 3:
        four = next((n for n in walk.path if n.meta["val"].dim() == 4), None)
        shape = four.meta["val"].shape if four is not None else scores
        rank3 = (shape[0], shape[1]) if len(shape) == 4 else (shape[0], 1)
    elif len(scores) != 4:
        raise _Stop("EFF-A105", "the scores have rank 3 and the result has not")
    lead = rank3 or (scores[0], scores[1])
    _check_shapes(product, values, walk, lead)
    q, k, v = (_four(p, lead) for p in (product.q, product.k, values.v))
    reads = [(product.left, product.node), (product.right, product.node)]
    reads += [(term.node, term.reader) for term in walk.terms if term.reader is not None]
    if walk.sinks is not None and walk.sinks_reader is not None:
        reads.append((walk.sinks, walk.sinks_reader))
    bases = _grouped(product, values) if rank3 is None and product.four and values.four else None
    if bases is not None:
        base_k, base_v = bases
        k, v = (lambda edit: base_k), (lambda edit: base_v)
        reads += [(base_k, product.k_node), (base_v, values.v_node)]  # type: ignore[list-item]
    return Match(
        idiom=f"{product.name}-softmax-{values.name}",
        anchor=anchor,
        q=q,
        k=k,
        v=v,
        terms=tuple(reversed(walk.terms)),
        scale=walk.scale,
        softcap=walk.softcap,
        sinks=walk.sinks,
        rank3=rank3,
        out_dims=values.out_dims,
        reads=tuple(reads),
        path=(*walk.path, anchor),
    )


def _check_shapes(product: Product, values: Product, walk: _Walk, lead: tuple[Any, Any]) -> None:
    """Refuse products that broadcast, and scores that change their batch and heads on the way."""
    for step in walk.path:
        shape = step.meta["val"].shape
        right = len(shape) == 4 and same_size(shape[0], lead[0]) and same_size(shape[1], lead[1])
        if not right and not (len(shape) == 3 and same_size(shape[0], lead[0] * lead[1])):
            raise _Stop("EFF-A105", "the scores change shape in an unknown way")
    for term in walk.terms:
        shape = term.node.meta["val"].shape
        if term.rank3 and len(shape) == 3 and values.four and not same_size(shape[0], 1):
            raise _Stop("EFF-A105", "a mask over joined batch and heads")
    for found in (product, values):
        a, b = found.left.meta["val"].shape, found.right.meta["val"].shape
        if found.name == "einsum" or all(map(same_size, a[:-2], b[:-2])):
            continue
        shared = len(a) == 4 and same_size(a[0], b[0]) and same_size(b[1], 1)  # one key/value head for all
        if not shared or not same_size(product.right.meta["val"].shape[1], values.right.meta["val"].shape[1]):
            raise _Stop("EFF-A105", "the products broadcast their operands")


def _grouped(product: Product, values: Product) -> tuple[fx.Node, fx.Node] | None:
    """Return keys and values before `repeat_kv`, where both are repeated alike."""
    if product.k_node is None or values.v_node is None:
        return None
    base_k, base_v = unrepeated(product.k_node), unrepeated(values.v_node)
    if base_k is product.k_node or base_v is values.v_node:
        return None
    return (base_k, base_v) if same_size(base_k.meta["val"].shape[1], base_v.meta["val"].shape[1]) else None


def _four(operand: Operand, lead: tuple[Any, Any]) -> Operand:
    """View a `[B*H, S, D]` operand as `[B, H, S, D]`."""

    def build(edit: Editor) -> fx.Node:
        node = operand(edit)
        value = node.meta["val"]
        if value.dim() == 4:
            return node
        shape = [*lead, value.shape[1], value.shape[2]]
        return edit.call(torch.ops.aten.reshape.default, node, [edit.size(n) for n in shape])

    return build
