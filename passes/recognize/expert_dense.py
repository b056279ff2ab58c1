"""Read spellings that run all experts on all tokens, with weights that are 0 outside the chosen ones.

    (experts(x)[E, T, H] * weights[T, E].T[..., None]).sum(0)       weights on what an expert gives
    experts(x * weights.T[..., None]).sum(0)                        or on what it gets: Llama 4
    einsum("etd,te->td", experts(x), weights)                       and products as einsums

That weights are 0 has to be seen: numbers of a top-k written into zeros, a sigmoid or softmax of scores that are -inf elsewhere, or
a sum of one-hot rows. A softmax over all experts is no mixture of a few, and stays. Weights on the input side leave 0 where an
expert was not chosen, of which experts without biases make 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from effcompile.core.site import Refusal
from effcompile.passes.recognize import expert_parts as parts
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.expert_match import Match, weighted
from effcompile.passes.recognize.expert_parts import Product, Seen, Stop, einsum_letters, shape
from effcompile.passes.recognize.gates import read_gate
from effcompile.passes.recognize.match import same_size


@dataclass(frozen=True)
class _Chosen:
    """Hold the ids `[T, k]` of the chosen experts and their weights, or the tensor `[T, E]` that has them (`spread`)."""

    ids: fx.Node
    weights: fx.Node
    spread: bool


def is_combine(node: fx.Node) -> bool:
    """Tell whether a node is an einsum that sums over experts: three letters and two to two, such as `etd,te->td`."""
    letters = einsum_letters(node)
    return letters is not None and len(letters[2]) == 2 and {len(letters[0]), len(letters[1])} == {2, 3}


def combined(node: fx.Node, seen: Seen) -> Match:
    """Read an einsum over experts."""
    letters = einsum_letters(node)
    assert letters is not None
    operands = list(zip(letters[:2], node.args[1]))  # type: ignore[arg-type]
    operands.sort(key=lambda item: -len(item[0]))
    (wide, value), (narrow, share) = operands
    token, depth = letters[2][0], letters[2][1]
    (expert,) = set(wide) - {token, depth} or {""}
    if set(wide) != {expert, token, depth} or set(narrow) != {expert, token} or wide[-1] != depth:
        raise Stop("EFF-M102", f"`{node.args[0]}` does not sum over the experts of a token")
    order = "et" if wide[0] == expert else "te"
    first, second, gate = _products(parts.through(value, seen), seen, order)
    spread = parts.through(share, seen)
    if narrow[0] == expert:
        spread = _turned(spread, seen)
    chosen = _chosen(spread, node, first, seen)
    return Match(
        "einsum",
        node,
        _tokens(first, seen),
        chosen.ids,
        chosen.weights,
        first,
        second,
        gate,
        seen,
        "out",
        chosen.spread,
    )


def summed(node: fx.Node, seen: Seen) -> Match:
    """Read a sum over the first dimension, the experts."""
    value = parts.through(node.args[0], seen)
    if op_name(value) != "mul":
        return _fed(node, value, seen)
    value, share = weighted(value, seen)
    first, second, gate = _products(parts.through(value, seen), seen, "et")
    spread = _turned(parts.through(share, seen, "unsqueeze", *parts.VIEWS), seen)
    chosen = _chosen(spread, share, first, seen)
    return Match(
        "dense", node, _tokens(first, seen), chosen.ids, chosen.weights, first, second, gate, seen, "out", chosen.spread
    )


def _fed(node: fx.Node, value: fx.Node, seen: Seen) -> Match:
    """Read experts of tokens that are weighted before: rows e T + t, or `[E, T, H]`, of x[t] * weights[t, e]."""
    first, second, gate = _products(value, seen, "et")
    if first.bias is not None or second.bias is not None:
        raise Stop("EFF-M102", "experts with biases give more than 0 of a token that did not choose them")
    fed = parts.through(first.rows, seen)
    if op_name(fed) != "mul":
        raise Stop("EFF-M102", "all experts on all tokens, and no weights")
    rows, share = weighted(fed, seen)
    spread = _turned(parts.through(share, seen, "unsqueeze", *parts.VIEWS), seen)
    chosen = _chosen(spread, share, first, seen)
    x = _repeated(rows, seen)
    return Match("dense", node, x, chosen.ids, chosen.weights, first, second, gate, seen, "in", chosen.spread)


def _products(node: fx.Node, seen: Seen, order: str) -> tuple[Product, Product, Any]:
    second = parts.product(node, seen)
    gate = read_gate(second.rows)
    if isinstance(gate, Refusal):
        raise Stop(gate.code, gate.reason)
    seen.path += gate.path
    first = parts.product(gate.source, seen)
    if first.kind != "dense" or second.kind != "dense" or first.transposed != second.transposed:
        raise Stop("EFF-M104", "the two products are written in two ways")
    if not first.order == second.order == second.rows_order == order:
        raise Stop("EFF-M104", "experts and tokens change places between the products")
    return first, second, gate.gate


def _tokens(first: Product, seen: Seen) -> fx.Node:
    """Return x `[T, H]` of the rows of all experts."""
    if first.rows_order == "t":
        rows = parts.casts(first.rows, seen)
        return seen.read(rows, seen.path[-1])
    if first.rows_order != "et":
        raise Stop("EFF-M104", "not all experts get all tokens")
    return _repeated(first.rows, seen)


def _repeated(node: fx.Node, seen: Seen) -> fx.Node:
    """Return x of x repeated once for each expert, one expert's tokens behind the other's."""
    start = len(seen.path)
    rows = parts.through(node, seen, "expand", "repeat", "unsqueeze", *parts.COPIES)
    if len(shape(rows)) != 2:
        raise Stop("EFF-M104", "not all experts get all tokens")
    for step in seen.path[start:]:
        if op_name(step) == "repeat" and list(step.args[1])[1:] not in ([1], [1, 1]):  # type: ignore[arg-type]
            raise Stop("EFF-M104", "tokens are repeated in another way than once for each expert")
        if op_name(step) == "unsqueeze" and step.args[0] is rows and step.args[1] not in (0, -3):
            raise Stop("EFF-M104", "not all experts get all tokens")
    return seen.read(rows, seen.path[-1] if len(seen.path) > start else node)


def _turned(node: fx.Node, seen: Seen) -> fx.Node:
    """Return weights `[T, E]` of weights `[E, T]`."""
    if op_name(node) not in ("t", "transpose", "permute", "numpy_T"):
        raise Stop("EFF-M102", "the weights of all experts are not [T, E] turned around")
    seen.take(node, "the weights")
    return parts.through(node.args[0], seen)


def _chosen(node: fx.Node, reader: fx.Node, first: Product, seen: Seen) -> _Chosen:
    """Return who is chosen, of weights `[T, E]` that are proved to be 0 elsewhere."""
    reader = seen.path[-1] if seen.path and node in seen.path[-1].all_input_nodes else reader
    if not same_size(shape(node)[-1], shape(first.weight)[0]):
        raise Stop("EFF-M102", "weights of another number of experts")
    name = op_name(node)
    if name in ("scatter", "scatter_"):
        found = _scattered(node, 0.0)
        seen.take(node, "the weights")
        seen.take(node.args[0], "zeros")
        seen.read(found.ids, node)
        seen.read(found.weights, node)
        return found
    if name == "sum" and parts.dims(node) in ((1,), (-2,)) and not parts.keeps(node):
        return _one_hot(node, seen)
    if name in ("sigmoid", "softmax", "_softmax") and (name == "sigmoid" or node.args[1] in (1, -1)):
        inner: Any = node.args[0]
        while op_name(inner) in parts.COPIES:
            inner = inner.args[0]
        if op_name(inner) in ("scatter", "scatter_"):
            ids = _scattered(inner, -math.inf).ids
            seen.read(ids, inner)
            return _Chosen(ids, seen.read(node, reader), True)
    raise Stop("EFF-M102", "the weights of all experts are not those of a top-k, with zeros elsewhere")


def _scattered(node: fx.Node, fill: float) -> _Chosen:
    """Read `base.scatter(1, ids, weights)` into a base that holds `fill` alone; the ids of a token are different."""
    if node.args[1] not in (1, -1) or node.kwargs:
        raise Stop("EFF-M102", "the weights of all experts are not those of a top-k, with zeros elsewhere")
    base, ids, weights = node.args[0], node.args[2], node.args[3]
    empty = op_name(base) in ("zeros", "new_zeros", "zeros_like") if fill == 0 else False  # type: ignore[arg-type]
    full = op_name(base) in ("full", "full_like", "new_full")  # type: ignore[arg-type]
    value = base.args[2 if op_name(base) == "new_full" else 1] if full else None  # type: ignore[union-attr, arg-type]
    if not empty and value != fill:
        raise Stop("EFF-M102", "weights outside the top-k are not zeros")
    if not isinstance(ids, fx.Node) or not isinstance(weights, fx.Node) or not parts.is_unique_choice(ids):
        raise Stop("EFF-M102", "the ids do not come from a top-k, so that one may be there twice")
    return _Chosen(ids, weights, False)


def _one_hot(node: fx.Node, seen: Seen) -> _Chosen:
    """Read the sum over k of one-hot rows `[T, k, E]` times weights `[T, k, 1]`; an id may be there twice."""
    seen.take(node, "the weights")
    value = parts.through(node.args[0], seen)
    if op_name(value) != "mul":
        raise Stop("EFF-M102", "weights of all experts that are no one-hot rows times weights")
    rows, share = weighted(value, seen)
    hot = parts.through(rows, seen)
    if op_name(hot) != "one_hot" or op_name(share) != "unsqueeze":
        raise Stop("EFF-M102", "weights of all experts that are no one-hot rows times weights")
    ids: Any = hot.args[0]
    weights: Any = share.args[0]
    seen.path += [hot, share]
    if len(shape(ids)) != 2 or len(shape(weights)) != 2:
        raise Stop("EFF-M102", "the weights are not [T, k]")
    return _Chosen(seen.read(ids, hot), seen.read(weights, share), False)
