"""Read what an expert does between its two products: which halves, which activation, which limits.

The walk starts at what the second product reads and ends at what the first one gave. Casts to float32 or back are followed: the op
computes a gate in float32. The same walk reads the `_apply_gate` of a module, once traced.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from effcompile.core.experts import Gate
from effcompile.core.site import Refusal
from effcompile.passes.recognize.elements import op_name

CODE = "EFF-M103"
_SAME = ("to", "_to_copy", "contiguous", "alias")
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class ReadGate:
    """Hold the gate, the node whose value it reads, and the nodes in between."""

    gate: Gate
    source: fx.Node
    path: tuple[fx.Node, ...]


class _Unknown(Exception):
    pass


@dataclass
class _Walk:
    path: list[fx.Node] = field(default_factory=list)
    halves: dict[int, fx.Node] = field(default_factory=dict)
    layouts: set[str] = field(default_factory=set)
    products: Mapping[fx.Node, int] = field(default_factory=dict)

    def same(self, node: Any) -> fx.Node:
        """Follow casts and copies that keep what a gate in float32 would see."""
        if not isinstance(node, fx.Node):
            raise _Unknown(f"a number where a tensor is expected ({node})")
        while op_name(node) in _SAME and isinstance(node.args[0], fx.Node):
            kinds = {node.meta["val"].dtype, node.args[0].meta["val"].dtype}
            if len(kinds) > 1 and not kinds & set(_WIDE):
                raise _Unknown(f"`{node.name}` rounds within the gate")
            self.path.append(node)
            node = node.args[0]
        return node


def read_gate(node: fx.Node, products: Mapping[fx.Node, int] | None = None) -> ReadGate | Refusal:
    """Return the gate whose result is `node`, or why it is none that is known.

    `products` maps nodes that are the first (0) and the second half (1) by themselves, where two products give the halves.
    """
    walk = _Walk(products=products or {})
    try:
        gate, source = _gate(walk.same(node), walk)
    except _Unknown as why:
        return Refusal(CODE, f"the gate inside the experts is not one that is known: {why}")
    return ReadGate(gate, source, tuple(walk.path))


def _gate(node: fx.Node, walk: _Walk) -> tuple[Gate, fx.Node]:
    """Read act(g) * (u + beta) in either order, or act(g) alone."""
    if op_name(node) == "mul" and _both_nodes(node):
        sides = [(node.args[0], node.args[1]), (node.args[1], node.args[0])]
        reasons: list[str] = []
        for first, second in sides:
            trial = _Walk([*walk.path, node], products=walk.products)
            try:
                act, alpha, low = _act(trial.same(first), trial)
                beta, high = _up(trial.same(second), trial)
                layout, source = _halves(trial)
                if low != high:
                    raise _Unknown(f"the gate is capped at {low:g}, the other half at {high:g}")
            except _Unknown as why:
                reasons.append(str(why))
                continue
            walk.path[:] = trial.path
            return Gate(act, layout, alpha, beta, low), source
        if op_name(walk.same(node.args[0])) != "relu" or node.args[0] is not node.args[1]:
            raise _Unknown(reasons[0])
    return _plain(node, walk)


def _plain(node: fx.Node, walk: _Walk) -> tuple[Gate, fx.Node]:
    name = op_name(node)
    squared = (
        (name == "pow" and node.args[1] == 2) or name == "square" or (name == "mul" and node.args[0] is node.args[1])
    )
    if squared:
        inner = walk.same(node.args[0])
        if op_name(inner) != "relu":
            raise _Unknown("a square of what is no relu")
        walk.path += [node, inner]
        return Gate("relu2", "none"), walk.same(inner.args[0])
    found = _pointwise(node)
    if found is None:
        raise _Unknown(f"`{name or node.op}` is neither a gate nor an activation")
    walk.path.append(node)
    return Gate(found, "none"), walk.same(node.args[0])


def _act(node: fx.Node, walk: _Walk) -> tuple[str, float, float]:
    """Return (act, alpha, limit) of act(min(g, limit))."""
    found = _pointwise(node)
    if found is not None:
        walk.path.append(node)
        return found, 1.0, _capped(walk.same(node.args[0]), walk)
    if op_name(node) == "mul" and _both_nodes(node):
        for g, sigmoid in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            sigmoid = walk.same(sigmoid)
            if op_name(sigmoid) != "sigmoid":
                continue
            inner, alpha = walk.same(sigmoid.args[0]), 1.0
            scaled = [inner]
            if op_name(inner) == "mul" and isinstance(inner.args[1], int | float):
                inner, alpha = walk.same(inner.args[0]), float(inner.args[1])
            if inner is not walk.same(g):
                raise _Unknown("the sigmoid is of something else than the gate")
            walk.path += [node, sigmoid, *(scaled if alpha != 1 else [])]
            return "silu", alpha, _capped(inner, walk)
    raise _Unknown(f"`{op_name(node) or node.op}` is no activation that is known")


def _pointwise(node: fx.Node) -> str | None:
    name = op_name(node)
    if name in ("silu", "relu"):
        return name
    if name == "gelu":
        given = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return "gelu_tanh" if given == "tanh" else "gelu"
    return None


def _capped(node: fx.Node, walk: _Walk) -> float:
    """Return the limit of min(g, limit), 0 where there is none; g is the first half."""
    limit = 0.0
    if (ends := _clamp(node)) is not None:
        low, high = ends
        if low is not None or high is None or high <= 0:
            raise _Unknown("the gate is clamped in another way than from above")
        limit = high
        walk.path.append(node)
        node = walk.same(node.args[0])
    _half(node, 0, walk)
    return limit


def _up(node: fx.Node, walk: _Walk) -> tuple[float, float]:
    """Return (beta, limit) of clamp(u, -limit, limit) + beta; u is the second half."""
    beta, limit = 0.0, 0.0
    if op_name(node) == "add" and isinstance(node.args[1], int | float) and not node.kwargs:
        beta = float(node.args[1])
        walk.path.append(node)
        node = walk.same(node.args[0])
    if (ends := _clamp(node)) is not None:
        low, high = ends
        if low is None or high is None or low != -high or high <= 0:
            raise _Unknown("the other half is clamped unevenly")
        limit = high
        walk.path.append(node)
        node = walk.same(node.args[0])
    _half(node, 1, walk)
    return beta, limit


def _clamp(node: fx.Node) -> tuple[float | None, float | None] | None:
    name = op_name(node)
    given: list[Any] = [*node.args[1:], None, None]
    if name == "clamp":
        low, high = node.kwargs.get("min", given[0]), node.kwargs.get("max", given[1])
    elif name == "clamp_max":
        low, high = None, given[0]
    else:
        return None
    if any(isinstance(end, fx.Node) for end in (low, high)):
        raise _Unknown("a limit that is a tensor")
    return (None if low is None else float(low), None if high is None else float(high))  # type: ignore[arg-type]


def _half(node: fx.Node, which: int, walk: _Walk) -> None:
    """Note that `node` is one half of a tensor along its last dimension; `which` is 0 or 1."""
    if node in walk.products:
        if walk.products[node] != which:
            raise _Unknown("the halves are the other way round")
        walk.halves[which] = node
        walk.layouts.add("concat")
        return
    made = _taken(node)
    if made is None:
        raise _Unknown(f"`{op_name(node) or node.op}` is no half of the first product")
    source, place, layout, between = made
    if place != which:
        raise _Unknown("the halves are the other way round")
    walk.halves[which] = source
    walk.layouts.add(layout)
    walk.path += [node, *between]


def _taken(node: fx.Node) -> tuple[fx.Node, int, str, tuple[fx.Node, ...]] | None:
    """Return (whole, 0 or 1, layout, nodes in between) of a half."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        parts = node.args[0]
        whole = parts.args[0]
        if not isinstance(whole, fx.Node):
            return None
        value = whole.meta["val"]
        dim = parts.kwargs.get("dim", parts.args[2] if len(parts.args) > 2 else 0)
        sizes = parts.args[1]
        even = sizes == 2 if op_name(parts) == "chunk" else sizes in (value.shape[-1] // 2, [value.shape[-1] // 2] * 2)
        if op_name(parts) not in ("chunk", "split", "split_with_sizes") or dim not in (-1, value.dim() - 1) or not even:
            return None
        return whole, int(node.args[1]), "concat", (parts,)  # type: ignore[arg-type]
    if op_name(node) == "slice" and isinstance(node.args[0], fx.Node):
        whole = node.args[0]
        value = whole.meta["val"]
        given: list[Any] = list(node.args[1:])
        rest: list[Any] = [0, None, None, 1]
        dim, start, end, step = given + rest[len(given) :]
        wide = value.shape[-1]
        if dim not in (-1, value.dim() - 1) or not isinstance(wide, int) or wide % 2:
            return None
        start = 0 if start is None else start
        end = wide if end is None or (isinstance(end, int) and end > wide) else end
        if step == 2 and start in (0, 1) and end == wide:
            return whole, int(start), "interleaved", ()  # type: ignore[arg-type]
        if step == 1 and (start, end) in ((0, wide // 2), (wide // 2, wide)):
            return whole, int(start != 0), "concat", ()
    return None


def _halves(walk: _Walk) -> tuple[str, fx.Node]:
    if len(walk.halves) != 2 or len(walk.layouts) != 1:
        raise _Unknown("two halves of one layout are needed")
    first, second = walk.same(walk.halves[0]), walk.same(walk.halves[1])
    if first is not second and not {first, second} <= walk.products.keys():
        raise _Unknown("the halves come from two tensors")
    return next(iter(walk.layouts)), first


def _both_nodes(node: fx.Node) -> bool:
    return all(isinstance(arg, fx.Node) for arg in node.args[:2])
