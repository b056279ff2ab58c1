"""Follow the token axis through an operation: which dimension of its result belongs to tokens, and to sequences of a batch.

Nothing here knows what a token is: heads are followed by the same rules (`head_axis.py`).

One rule an operation, like the batching rules of `vmap`. An operation is *row by row* where each token of its result depends on the
same token of its operands alone; it then runs on fewer tokens as it is. Whatever has no rule, mixes tokens, or picks some of
them *reads* tokens: that is no error, but it needs every token.

A view can merge the token axis with others, `[B, N, C]` to `[B * N, C]`, and split it off again: a `Place` says where among the
factors of a dimension an axis lies.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from effcompile.passes.recognize.elements import is_write, op_name

_ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "div",
    "pow",
    "sqrt",
    "rsqrt",
    "neg",
    "abs",
    "exp",
    "log",
    "clamp",
    "clamp_min",
    "reciprocal",
)
_ACTIVATIONS = (
    "tanh",
    "sigmoid",
    "relu",
    "gelu",
    "silu",
    "elu",
    "leaky_relu",
    "hardtanh",
    "mish",
    "softplus",
    "erf",
    "square",
)
_CASTS = ("to", "_to_copy", "contiguous", "clone", "alias", "detach", "type_as", "float", "zeros_like", "ones_like")
_CHOOSING = ("where", "masked_fill", "lerp", "maximum", "minimum", "logical_not", "logical_and", "logical_or")
_COMPARING = ("eq", "ne", "le", "lt", "ge", "gt", "relu6", "hardswish", "hardsigmoid", "cos", "sin", "addcmul")
POINTWISE = frozenset((*_ARITHMETIC, *_ACTIVATIONS, *_CASTS, *_CHOOSING, *_COMPARING))
VIEWS = frozenset(("view", "reshape", "_unsafe_view", "flatten", "unflatten"))
REDUCTIONS = frozenset(("mean", "sum", "var", "amax", "amin", "linalg_vector_norm", "argmax", "std"))
ALONG = frozenset(("softmax", "_softmax", "log_softmax", "cumsum", "sort", "topk"))


@dataclass(frozen=True)
class Place:
    """Say where an axis lies: in dimension `dim`, which is `before` x axis x `after` elements long."""

    dim: int
    before: Any = 1
    after: Any = 1

    @property
    def alone(self) -> bool:
        """Tell whether the dimension is the axis and nothing else."""
        return self.before == 1 and self.after == 1


@dataclass(frozen=True)
class Axis:
    """Hold the places of the tokens and of the batch in one value."""

    tokens: Place
    batch: Place

    def moved(self, place: Callable[[Place], Place]) -> Axis:
        """Return the axis with both places changed."""
        return Axis(place(self.tokens), place(self.batch))


class Reads(Exception):
    """Say why an operation needs every token."""


@dataclass(frozen=True)
class Follower:
    """Apply the rules for a stream of `tokens` tokens in `batch` sequences; `sides` collects operands of a token's place.

    A side operand does not come from the stream and has an element for every token: positions, rotations, an older state.
    """

    tokens: Any
    batch: Any

    def follow(self, node: fx.Node, known: dict[fx.Node, Axis]) -> tuple[Axis | None, dict[fx.Node, Axis]]:
        """Return the axis of a node's result, None where that is no tensor, and its side operands.

        Raises:
            Reads: the node does not work token by token.
        """
        name = op_name(node)
        mine = [arg for arg in node.all_input_nodes if arg in known]
        if is_write(node):
            raise Reads("it writes in place")
        if node.target is operator.getitem:
            return known[mine[0]], {}
        if node.op != "call_function" or not name:
            raise Reads("it is no operation of ATen")
        if name == "sym_size":
            if self._dim(node.args[1], mine[0]) == known[mine[0]].tokens.dim:
                raise Reads("it asks for the number of tokens")
            return None, {}
        if name in POINTWISE:
            return self._pointwise(node, known)
        if len(mine) != 1 and name not in ("cat", "stack"):
            raise Reads("it takes several values of the stream")
        rule = _RULES.get(name)
        if name in VIEWS:
            return known[mine[0]].moved(lambda place: self._viewed(node, mine[0], place, known[mine[0]])), {}
        if name in ("cat", "stack"):
            return self._joined(node, known)
        if rule is None or node.args[0] is not mine[0]:
            if name in ("addmm", "baddbmm") and node.args[1] is mine[0]:
                return self._away_from(node, known[mine[0]], mine[0], -1), {}
            raise Reads("no rule says that it works token by token")
        return rule(self, node, mine[0], known[mine[0]]), {}

    # --- rules ---------------------------------------------------------------------------------------------------------

    def _pointwise(self, node: fx.Node, known: dict[fx.Node, Axis]) -> tuple[Axis, dict[fx.Node, Axis]]:
        out = rank(node)
        found: set[Axis] = set()
        for arg in node.all_input_nodes:
            if arg in known:
                found.add(_from_behind(known[arg], out - rank(arg)))
        if len(found) != 1:
            raise Reads("it pairs different tokens")
        (axis,) = found
        sides: dict[fx.Node, Axis] = {}
        extent = node.meta["val"].shape[axis.tokens.dim]
        for arg in node.all_input_nodes:
            if arg in known or not isinstance(arg.meta.get("val"), torch.Tensor):
                continue
            dim = axis.tokens.dim - (out - rank(arg))
            if dim < 0 or _is(arg.meta["val"].shape[dim], 1):
                continue
            if not axis.tokens.alone or not _is(arg.meta["val"].shape[dim], extent):
                raise Reads("an operand has an element for every token, in a merged dimension")
            sides[arg] = Axis(Place(dim), Place(axis.batch.dim - (out - rank(arg))))
        return axis, sides

    def _joined(self, node: fx.Node, known: dict[fx.Node, Axis]) -> tuple[Axis, dict[fx.Node, Axis]]:
        parts = node.args[0]
        assert isinstance(parts, list | tuple)
        found = {known[part] for part in parts if part in known}  # type: ignore[index]
        if len(found) != 1:
            raise Reads("it joins different tokens")
        (axis,) = found
        dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[call-overload]
        dim %= rank(node)
        full = [part for part in parts if not _is_nothing(part)]
        if op_name(node) == "cat" and dim in (axis.tokens.dim, axis.batch.dim) and len(full) != 1:
            raise Reads("it adds tokens to the sequence")
        sides: dict[fx.Node, Axis] = {}
        for part in full:
            if part not in known:
                if not axis.tokens.alone:
                    raise Reads("it joins values in a merged dimension")
                sides[part] = axis  # type: ignore[index]
        if op_name(node) == "stack":
            axis = axis.moved(lambda place: Place(place.dim + (place.dim >= dim), place.before, place.after))
        return axis, sides

    def _viewed(self, node: fx.Node, source: fx.Node, place: Place, axis: Axis) -> Place:
        """Find the axis among the factors of the viewed shape."""
        extent = self.tokens if place is axis.tokens else self.batch
        old, new = (list(map(_expr, item.meta["val"].shape)) for item in (source, node))
        lead = sympy.prod(old[: place.dim]) * _expr(place.before)
        for dim, size in enumerate(new):
            before = _quotient(lead, sympy.prod(new[:dim]))
            after = None if before is None else _quotient(size, before * _expr(extent))
            if before is not None and after is not None:
                return Place(dim, _plain(before), _plain(after))
        raise Reads("the view cuts the token axis into pieces")

    def _same(self, node: fx.Node, source: fx.Node, axis: Axis) -> Axis:
        return axis

    def _away_from(self, node: fx.Node, axis: Axis, source: fx.Node, *dims: int) -> Axis:
        """Return the axis where none of the dimensions of the operand that are mixed holds tokens or batch."""
        mixed = {dim % rank(source) for dim in dims}
        if {axis.tokens.dim, axis.batch.dim} & mixed:
            raise Reads("it mixes tokens")
        return axis

    def _last(self, node: fx.Node, source: fx.Node, axis: Axis) -> Axis:
        return self._away_from(node, axis, source, -1)

    def _product(self, node: fx.Node, source: fx.Node, axis: Axis) -> Axis:
        other = node.args[1]
        if not isinstance(other, fx.Node) or rank(other) != 2:
            raise Reads("it multiplies by more than one matrix")
        return self._away_from(node, axis, source, -1)

    def _normed(self, node: fx.Node, source: fx.Node, axis: Axis) -> Axis:
        count = len(node.args[1])  # type: ignore[arg-type]
        return self._away_from(node, axis, source, *range(-count, 0))

    def _along(self, node: fx.Node, source: fx.Node, axis: Axis) -> Axis:
        place = 2 if op_name(node) == "topk" else 1
        dim = node.args[place] if len(node.args) > place else -1
        if not isinstance(dim, int):
            raise Reads("it works along a dimension that is no number")
        return self._away_from(node, axis, source, dim)

    def _reduced(self, node: fx.Node, source: fx.Node, axis: Axis) -> Axis:
        dims = node.args[2] if op_name(node) == "linalg_vector_norm" and len(node.args) > 2 else None
        if op_name(node) != "linalg_vector_norm":
            dims = node.args[1] if len(node.args) > 1 else None
        listed = [dims] if isinstance(dims, int) else dims
        if not isinstance(listed, list | tuple) or not listed or not all(isinstance(d, int) for d in listed):
            raise Reads("it adds up all tokens")
        self._away_from(node, axis, source, *listed)  # type: ignore[arg-type]
        if rank(node) == rank(source):
            return axis
        gone = sorted(int(d) % rank(source) for d in listed)  # type: ignore[call-overload]
        return axis.moved(lambda p: Place(p.dim - sum(g < p.dim for g in gone), p.before, p.after))

    def _permuted(self, node: fx.Node, source: fx.Node, axis: Axis) -> Axis:
        order = list(range(rank(source)))
        if op_name(node) == "permute":
            order = [int(d) % rank(source) for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        elif op_name(node) == "t":
            order.reverse()
        else:
            a, b = (int(d) % rank(source) for d in node.args[1:3])  # type: ignore[arg-type]
            order[a], order[b] = order[b], order[a]
        return axis.moved(lambda p: Place(order.index(p.dim), p.before, p.after))

    def _unsqueezed(self, node: fx.Node, source: fx.Node, axis: Axis) -> Axis:
        dim = int(node.args[1]) % rank(node)  # type: ignore[arg-type]
        return axis.moved(lambda p: Place(p.dim + (p.dim >= dim), p.before, p.after))

    def _squeezed(self, node: fx.Node, source: fx.Node, axis: Axis) -> Axis:
        if len(node.args) < 2 or not isinstance(node.args[1], int):
            raise Reads("it removes dimensions by their size")
        if rank(node) == rank(source):
            return axis
        return self._picked(node, source, axis)

    def _picked(self, node: fx.Node, source: fx.Node, axis: Axis) -> Axis:
        dim = int(node.args[1]) % rank(source)  # type: ignore[arg-type]
        if dim in (axis.tokens.dim, axis.batch.dim):
            raise Reads("it picks some of the tokens")
        return axis.moved(lambda p: Place(p.dim - (p.dim > dim), p.before, p.after))

    def _unbound(self, node: fx.Node, source: fx.Node, axis: Axis) -> Axis:
        dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        dim %= rank(source)
        if dim in (axis.tokens.dim, axis.batch.dim):
            raise Reads("it picks some of the tokens")
        return axis.moved(lambda p: Place(p.dim - (p.dim > dim), p.before, p.after))

    def _cut(self, node: fx.Node, source: fx.Node, axis: Axis) -> Axis:
        place = 1 if op_name(node) == "slice" else 2
        dim = int(node.args[place]) % rank(source) if len(node.args) > place else 0  # type: ignore[arg-type]
        if dim == axis.tokens.dim != axis.batch.dim and axis.tokens.before != 1:
            return replace(axis, tokens=self._cut_between(node, source, axis.tokens))
        if dim in (axis.tokens.dim, axis.batch.dim):
            raise Reads("it picks some of the tokens")
        return axis

    def _cut_between(self, node: fx.Node, source: fx.Node, place: Place) -> Place:
        """Return where the axis lies in equal pieces of a merged dimension, each of which has all of it."""
        value, block = node.meta["val"], self.tokens * place.after
        sizes = [part.shape[place.dim] for part in (value if isinstance(value, list | tuple) else (value,))]
        starts_whole = op_name(node) != "slice" or (
            _whole(node.args[2] if len(node.args) > 2 else 0, block) and (len(node.args) < 5 or node.args[4] == 1)
        )
        if not starts_whole or len(set(map(str, sizes))) != 1 or not _whole(sizes[0], block):
            raise Reads("it cuts between tokens")
        return replace(place, before=sizes[0] // block)

    def _expanded(self, node: fx.Node, source: fx.Node, axis: Axis) -> Axis:
        by = rank(node) - rank(source)
        return axis.moved(lambda p: Place(p.dim + by, p.before, p.after))

    def _dim(self, value: Any, source: fx.Node) -> int:
        return int(value) % rank(source)


_RULES: dict[str, Callable[[Follower, fx.Node, fx.Node, Axis], Axis]] = {
    **dict.fromkeys(("linear",), Follower._last),
    **dict.fromkeys(("matmul", "mm"), Follower._product),
    **dict.fromkeys(("layer_norm", "rms_norm"), Follower._normed),
    **dict.fromkeys(ALONG, Follower._along),
    **dict.fromkeys(REDUCTIONS, Follower._reduced),
    **dict.fromkeys(("permute", "transpose", "t"), Follower._permuted),
    "unsqueeze": Follower._unsqueezed,
    "squeeze": Follower._squeezed,
    "select": Follower._picked,
    "unbind": Follower._unbound,
    **dict.fromkeys(("slice", "split", "split_with_sizes", "chunk"), Follower._cut),
    "expand": Follower._expanded,
}


def _whole(size: Any, block: Any) -> bool:
    """Tell whether a number is a multiple of another; sizes that are symbols are not known to be."""
    return isinstance(size, int) and isinstance(block, int) and size % block == 0


def _from_behind(axis: Axis, by: int) -> Axis:
    """Return the axis of an operand as broadcasting lines it up with a result of `by` more dimensions."""
    return axis.moved(lambda place: Place(place.dim + by, place.before, place.after))


def _is_nothing(node: Any) -> bool:
    """Tell whether a value has no element: what a cache holds before its first tokens."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and any(isinstance(size, int) and size == 0 for size in value.shape)


def rank(node: fx.Node) -> int:
    """Return the number of dimensions of a node's tensor, or of the first of its tensors."""
    value = node.meta["val"]
    return (
        int((value[0] if isinstance(value, list | tuple) else value).dim())
        if not isinstance(value, int | torch.SymInt)
        else 0
    )


def _expr(value: Any) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.sympify(value)


def _plain(value: Any) -> Any:
    return int(value) if getattr(value, "is_Integer", False) else value


def _quotient(a: Any, b: Any) -> Any | None:
    """Return a / b where that is a whole number, or a product of sizes."""
    if b == 0:
        return None
    value = sympy.cancel(a / b)
    return value if sympy.denom(value) == 1 and value != 0 else None


def _is(size: Any, other: Any) -> bool:
    return bool(_expr(size) == _expr(other))
