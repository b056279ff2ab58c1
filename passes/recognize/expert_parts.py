"""Read the parts of a mixture of experts: products with the experts' weights, and biases, fetched or not.

Each function takes the node where a part ends and returns what the part reads, or raises `Stop` with a code and a reason. Whatever
it passes goes into `Seen.path`; nothing outside may read that.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from effcompile.core.site import Refusal
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.match import same_size

GROUPED = ("_grouped_mm", "transformers::grouped_mm_fallback")
VIEWS = ("view", "reshape", "_unsafe_view")
COPIES = ("to", "_to_copy", "contiguous", "alias", "clone")


class Stop(Exception):
    """End a walk with a refusal."""

    def __init__(self, code: str, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.refusal = Refusal(code, reason, hint)


@dataclass
class Seen:
    """Collect the nodes between the operands and the result, who reads which operand, and how tokens are laid out."""

    path: list[fx.Node] = field(default_factory=list)
    reads: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    sort: fx.Node | None = None  # the node that gives the permutation, where tokens are sorted by expert
    order: fx.Node | None = None  # the permutation itself
    ids: fx.Node | None = None  # [T, k]
    offsets: fx.Node | None = None
    biased: list[fx.Node] = field(default_factory=list)

    def take(self, node: Any, what: str) -> fx.Node:
        """Add a node to the path and return it."""
        if not isinstance(node, fx.Node):
            raise Stop("EFF-M104", f"{what} is no tensor of the graph")
        self.path.append(node)
        return node

    def read(self, operand: fx.Node, reader: fx.Node) -> fx.Node:
        """Note that `reader` reads an operand."""
        self.reads.append((operand, reader))
        return operand


@dataclass(frozen=True)
class Product:
    """Hold one product with the weights of experts.

    `order` names the first dimensions of a dense one's result, experts `e` and tokens `t`; `rows_order` those of its rows, where
    one set of tokens for all experts is `t`.
    """

    rows: fx.Node  # what it multiplies, one row a slot (or [E, T, in] of a dense spelling)
    weight: fx.Node  # [E, out, in], or [E, in, out] where `transposed`
    bias: fx.Node | None
    transposed: bool
    kind: str  # grouped, batched or dense
    order: str = "et"
    rows_order: str = "et"


def shape(node: fx.Node) -> Any:
    """Return the recorded shape of a node, () where it is no tensor."""
    return getattr(node.meta.get("val"), "shape", ())


def through(node: Any, seen: Seen, *names: str) -> fx.Node:
    """Follow views and copies (or the named operations) back, as long as they keep the elements in order."""
    node = seen.take(node, "an operand")
    while op_name(node) in (names or (*VIEWS, *COPIES)) and isinstance(node.args[0], fx.Node):
        node = seen.take(node.args[0], "an operand")
    seen.path.pop()
    return node


def casts(node: Any, seen: Seen) -> fx.Node:
    """Follow casts between equal dtypes, which grouped products write before each call."""
    while isinstance(node, fx.Node) and op_name(node) in COPIES and isinstance(node.args[0], fx.Node):
        if node.meta["val"].dtype != node.args[0].meta["val"].dtype:
            break
        seen.path.append(node)
        node = node.args[0]
    return node


def product(node: fx.Node, seen: Seen) -> Product:
    """Return the product, with its bias, that ends at `node`."""
    node = seen.take(node, "a product")
    if op_name(node) in ("add", "add_") and _both(node) and not node.kwargs:
        first, second = node.args[0], node.args[1]
        if not _is_product(first):
            first, second = second, first
        if _is_product(first):
            made = product(first, seen)  # type: ignore[arg-type]
            return replace(made, bias=_bias(second, made, node, seen))
    name = op_name(node)
    if name in GROUPED:
        return _grouped(node, seen)
    if name == "baddbmm":
        made = _dense(node, node.args[1], node.args[2], seen)
        return Product(made.rows, made.weight, _bias(node.args[0], made, node, seen), made.transposed, made.kind)
    if name == "squeeze" and op_name(node.args[0]) == "bmm":
        return _batched(node, seen)
    if name == "bmm":
        return _dense(node, node.args[0], node.args[1], seen)
    if name == "einsum":
        return _einsum(node, seen)
    raise Stop("EFF-M104", f"`{name or node.op}` is no product with the weights of experts")


def _is_product(node: Any) -> bool:
    name = op_name(node) if isinstance(node, fx.Node) else ""
    if name == "squeeze":
        return op_name(node.args[0]) == "bmm"
    return name in (*GROUPED, "bmm")


def is_anchor(node: fx.Node) -> bool:
    """Tell whether a node multiplies by the weights of experts beyond doubt: grouped, or with weights fetched by expert."""
    if op_name(node) in GROUPED:
        return True
    return op_name(node) == "bmm" and any(
        isinstance(arg, fx.Node) and _fetched(arg, Seen()) is not None for arg in node.args[:2]
    )


def _grouped(node: fx.Node, seen: Seen) -> Product:
    rows, weight, offsets = node.args[:3]
    if (len(node.args) > 3 and any(item is not None for item in node.args[3:])) or node.kwargs:
        raise Stop("EFF-M104", "a grouped product with a bias or another dtype of its own")
    if seen.offsets is not None and seen.offsets is not offsets:
        raise Stop("EFF-M104", "the two products have different groups")
    seen.offsets = offsets  # type: ignore[assignment]
    found, transposed = _weight(weight, node, seen)
    return Product(casts(rows, seen), found, None, transposed, "grouped")


def _weight(node: Any, reader: fx.Node, seen: Seen) -> tuple[fx.Node, bool]:
    """Return the 3-D weight and whether it is `[E, in, out]`, given the right factor `[E, in, out]` of a product."""
    transposed = True
    while op_name(node) in ("transpose", *COPIES) and isinstance(node.args[0], fx.Node):
        if op_name(node) == "transpose":
            if {int(dim) % 3 for dim in node.args[1:3]} != {1, 2}:
                raise Stop("EFF-M104", "the weights are turned in another way than rows against columns")
            transposed = not transposed
        elif node.meta["val"].dtype != node.args[0].meta["val"].dtype:
            raise Stop("EFF-M105", "the weights are cast at every call", "model.to(dtype) once")
        seen.path.append(node)
        reader, node = node, node.args[0]
    if not isinstance(node, fx.Node) or len(shape(node)) != 3:
        raise Stop("EFF-M104", "the weights of the experts are no tensor [E, out, in]")
    return seen.read(node, reader), transposed


def _fetched(node: fx.Node, seen: Seen) -> tuple[fx.Node, fx.Node, bool] | None:
    """Return (weights of all experts, ids, turned) of weights that were fetched by expert, `weights[ids]`."""
    turned = False
    while op_name(node) == "transpose" and {int(dim) % 3 for dim in node.args[1:3]} == {1, 2}:  # type: ignore[call-overload]
        seen.path.append(node)
        turned, node = not turned, node.args[0]  # type: ignore[assignment]
    ids = indexed(node)
    whole = node.args[0] if ids is not None else None
    if ids is None or not isinstance(whole, fx.Node) or len(shape(whole)) != 3 or len(shape(ids)) != 1:
        return None
    seen.path.append(node)
    seen.read(whole, node)
    return whole, ids, turned


def indexed(node: Any) -> fx.Node | None:
    """Return the rows that `x[rows]` reads."""
    if not isinstance(node, fx.Node):
        return None
    if op_name(node) == "index" and len(node.args[1]) == 1:  # type: ignore[arg-type]
        return node.args[1][0]  # type: ignore[index, return-value]
    if op_name(node) == "index_select" and node.args[1] == 0:
        return node.args[2]  # type: ignore[return-value]
    return None


def _batched(node: fx.Node, seen: Seen) -> Product:
    bmm = seen.take(node.args[0], "a product")
    dim = int(node.args[1]) % 3  # type: ignore[call-overload]
    left, right = bmm.args[:2]
    weight, rows = (left, right) if dim == 2 else (right, left)
    found = _fetched(weight, seen)  # type: ignore[arg-type]
    if found is None or dim == 0:
        raise Stop("EFF-M104", "a batched product whose weights are not fetched by expert")
    whole, ids, turned = found
    rows = through(rows, seen, "contiguous", "clone")
    if op_name(rows) != "unsqueeze" or int(rows.args[1]) % 3 != dim:  # type: ignore[call-overload]
        raise Stop("EFF-M104", "a batched product of what is not one row an expert")
    seen.take(rows, "the rows")
    _same_ids(ids, seen)
    return Product(rows.args[0], whole, None, (dim == 1) != turned, "batched")  # type: ignore[arg-type]


def _dense(node: fx.Node, left: Any, right: Any, seen: Seen) -> Product:
    weight, transposed = _weight(right, node, seen)
    if not same_size(shape(left)[0], shape(weight)[0]):
        raise Stop("EFF-M104", "a batch of products that is not over experts")
    return Product(left, weight, None, transposed, "dense")


def einsum_letters(node: Any) -> tuple[str, str, str] | None:
    """Return the letters of two operands and of the result of an einsum; None for other nodes and other einsums."""
    if not isinstance(node, fx.Node) or op_name(node) != "einsum" or len(node.args[1]) != 2:  # type: ignore[arg-type]
        return None
    given, arrow, result = str(node.args[0]).replace(" ", "").partition("->")
    left, _, right = given.partition(",")
    plain = arrow and all(item.isalpha() and len(set(item)) == len(item) for item in (left, right, result))
    return (left, right, result) if plain else None


@dataclass(frozen=True)
class Einsum:
    """Hold the operands of an einsum of all tokens with the weights of experts: `transposed` where those are `[E, in, out]`."""

    rows: fx.Node
    weight: fx.Node
    transposed: bool
    order: str
    rows_order: str


def einsum_of_experts(node: fx.Node) -> Einsum | None:
    """Read the letters of `td,edf->etf`, `etf,efd->etd` and the like; None for other nodes."""
    letters = einsum_letters(node)
    if letters is None:
        return None
    left, right, result = letters
    for row, column, (rows, weight) in ((left, right, node.args[1]), (right, left, node.args[1][::-1])):  # type: ignore[index, misc]
        depth, token = set(row) & set(column) - set(result), set(row) - set(column)
        expert = (set(column) & set(result)) - set(result[-1:])
        one_each = len(depth) == len(token) == len(expert) == 1 and len(column) == len(result) == 3
        known = one_each and {column[0]} == expert and set(result) == {*token, *expert, result[-1]}
        if known and row[-1] in depth:
            names = {column[0]: "e", token.pop(): "t"}
            order, rows_order = ("".join(names[letter] for letter in item[:-1]) for item in (result, row))
            return Einsum(rows, weight, column[1] in depth, order, rows_order)
    return None


def _einsum(node: fx.Node, seen: Seen) -> Product:
    found = einsum_of_experts(node)
    if found is None:
        raise Stop(
            "EFF-M104", f"`{node.args[0]}` is no product of all tokens with the weights `[E, .., ..]` of experts"
        )
    weight, turned = _weight(found.weight, node, seen)  # as the right factor of a product, [E, in, out]
    return Product(found.rows, weight, None, turned == found.transposed, "dense", found.order, found.rows_order)


def _bias(node: Any, made: Product, reader: fx.Node, seen: Seen) -> fx.Node:
    """Return the bias `[E, out]` that is added to a product."""
    node = seen.take(node, "the bias")
    if made.kind == "dense":
        if op_name(node) == "unsqueeze" and node.args[1] in (1, -2) and len(shape(node.args[0])) == 2:  # type: ignore[arg-type]
            return seen.read(node.args[0], node)  # type: ignore[arg-type]
        raise Stop("EFF-M104", "what is added to a product is no bias of its expert")
    ids = indexed(node)
    whole = node.args[0]
    if ids is None or not isinstance(whole, fx.Node) or len(shape(whole)) != 2:
        raise Stop("EFF-M104", "what is added to a product is no bias of its expert")
    _same_ids(ids, seen)
    return seen.read(whole, node)


def _same_ids(ids: fx.Node, seen: Seen) -> None:
    """Check that rows are numbered by the ids of their slots: `[T k]` flat, or sorted where tokens are."""
    seen.biased.append(ids)


def dims(node: fx.Node) -> Sequence[int]:
    """Return the dimensions that a sum goes over."""
    given = node.args[1] if len(node.args) > 1 else ()
    return tuple(given) if isinstance(given, list | tuple) else (given,)  # type: ignore[return-value, arg-type]


def keeps(node: fx.Node) -> bool:
    """Tell whether a sum keeps its dimension."""
    return bool(node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False))


def _both(node: fx.Node) -> bool:
    return all(isinstance(arg, fx.Node) for arg in node.args[:2])


def is_unique_choice(ids: fx.Node) -> bool:
    """Tell whether the ids of a token are all different, being those of a top-k."""
    return ids.target is operator.getitem and ids.args[1] == 1 and op_name(ids.args[0]) == "topk"  # type: ignore[arg-type]


def kinds_agree(*nodes: fx.Node | None) -> bool:
    """Tell whether values have one floating-point dtype."""
    found = {node.meta["val"].dtype for node in nodes if node is not None}
    return len(found) == 1 and next(iter(found)) in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
