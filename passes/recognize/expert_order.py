"""Read how the slots of tokens are laid out: repeated, or sorted by expert and put back.

What is passed goes into `Seen.path`, as in `expert_parts.py`, and what is not known raises `Stop`.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.expert_parts import Seen, Stop, indexed, shape, through
from effcompile.passes.recognize.match import same_size


def flat_ids(node: Any, seen: Seen) -> fx.Node:
    """Return ids `[T, k]` of flat ones."""
    flat = node
    node = through(node, seen)
    if len(shape(node)) != 2 or node is flat:
        raise Stop("EFF-M104", "the ids of experts are not [T, k]")
    seen.path.append(flat)
    return seen.read(node, flat)


def settle_sorted(seen: Seen, experts: int) -> fx.Node:
    """Return the ids `[T, k]` of a sorted spelling, from its offsets; set the permutation."""
    counted = seen.take(seen.offsets, "the groups")
    if op_name(counted) != "cumsum" or counted.args[1] != 0:
        raise Stop("EFF-M104", "the groups are no running sum of tokens an expert")
    counts = through(counted.args[0], seen)
    seen.take(counts, "the counts")
    name = op_name(counts)
    if name == "histc":
        bins, low, high = [*counts.args[1:], 100, 0, 0][:3]
        if (bins, low, high) != (experts, 0, experts - 1):
            raise Stop("EFF-M104", f"a histogram over {bins} experts of {experts}")
    elif name == "bincount":
        least = counts.kwargs.get("minlength", counts.args[2] if len(counts.args) > 2 else 0)
        if least != experts:
            raise Stop("EFF-M104", f"tokens of {least} experts are counted, of {experts}")
    else:
        raise Stop("EFF-M104", f"`{name or counts.op}` does not count the tokens of an expert")
    counted_ids = through(counts.args[0], seen)
    seen.take(counted_ids, "the ids")
    sort = _sort_of(counted_ids)
    if sort is None:
        raise Stop("EFF-M104", "the ids are not sorted")
    if (len(sort.args) > 1 and sort.args[1] not in (0, -1)) or sort.args[2:3] == (True,):
        raise Stop("EFF-M104", "the ids are sorted in another order")
    seen.take(sort, "the sort")
    seen.sort = sort
    for ids in seen.biased:
        if through(ids, seen) is not counted_ids:
            raise Stop("EFF-M104", "a bias is fetched by other ids than the tokens")
    orders = [user for user in sort.users if user.target is operator.getitem and user.args[1] == 1]
    if len(orders) != 1:
        raise Stop("EFF-M104", "the order of the sorted tokens is not read once")
    seen.order = seen.take(orders[0], "the order")
    return flat_ids(sort.args[0], seen)


def _sort_of(node: fx.Node) -> fx.Node | None:
    if node.target is operator.getitem and node.args[1] == 0 and op_name(node.args[0]) == "sort":  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    return None


def is_inverse(node: Any, seen: Seen) -> bool:
    """Tell whether a node is the inverse of the permutation: positions written where it points, or its own argsort."""
    if not isinstance(node, fx.Node) or seen.order is None:
        return False
    seen.path.append(node)
    if op_name(node) == "argsort":
        return node.args[0] is seen.order and node.args[1:2] in ((), (-1,), (0,)) and True not in node.args[2:]
    if op_name(node) not in ("index_put_", "index_put", "scatter_", "scatter"):
        return False
    into = node.args[0]
    if op_name(into) not in ("empty_like", "zeros_like", "empty", "zeros", "new_empty"):  # type: ignore[arg-type]
        return False
    seen.path.append(into)  # type: ignore[arg-type]
    if op_name(node).startswith("index_put"):
        where, what = node.args[1], node.args[2]
        if node.args[3:4] == (True,) or len(where) != 1 or where[0] is not seen.order:  # type: ignore[arg-type, index]
            return False
    else:
        if node.args[1] not in (0, -1) or node.args[2] is not seen.order:
            return False
        what = node.args[3]
    if op_name(what) != "arange" or not same_size(shape(what)[0], shape(seen.order)[0]):  # type: ignore[arg-type]
        return False
    seen.path.append(what)  # type: ignore[arg-type]
    starts = what.args[:-1] if len(what.args) > 1 else ()  # type: ignore[union-attr]
    return all(start == 0 for start in starts[:1])


def expanded(node: fx.Node, top_k: Any, seen: Seen) -> fx.Node:
    """Return tokens x `[T, H]` of rows `[T k, H]`, one for each slot: repeated, or fetched in the sorted order."""
    name = op_name(node)
    if seen.order is not None:
        tokens = indexed(node)
        if tokens is None or not _is_token(tokens, top_k, seen):
            raise Stop("EFF-M104", "the rows are not the tokens in sorted order")
        seen.take(node, "the rows")
        return seen.read(node.args[0], node)  # type: ignore[arg-type]
    if name == "repeat_interleave" and node.args[2:3] in ((0,), ()) and same_size(node.args[1], top_k):
        if node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None) != 0:
            raise Stop("EFF-M104", "the rows are not each token repeated")
        seen.take(node, "the rows")
        return seen.read(node.args[0], node)  # type: ignore[arg-type]
    inner = through(node, seen)
    if inner is not node and op_name(inner) == "expand" and len(shape(inner)) == 3:
        base = inner.args[0]
        if op_name(base) == "unsqueeze" and base.args[1] in (1, -2) and same_size(shape(inner)[1], top_k):  # type: ignore[union-attr, arg-type]
            seen.path += [node, inner, base]  # type: ignore[list-item]
            return seen.read(base.args[0], base)  # type: ignore[union-attr, arg-type]
    raise Stop("EFF-M104", "the rows of the first product are not each token repeated")


def _is_token(node: fx.Node, top_k: Any, seen: Seen) -> bool:
    name = op_name(node)
    floored = name == "floor_divide" or (name == "div" and node.kwargs.get("rounding_mode") in ("floor", "trunc"))
    if not floored or node.args[0] is not seen.order or not same_size(node.args[1], top_k):
        return False
    seen.take(node, "the tokens")
    return True
