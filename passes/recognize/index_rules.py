"""Give each op that looks up, scans or joins its meaning at one element."""

from __future__ import annotations

import torch
from torch import fx

from effcompile.core.expr import BOOL, INT, Expr, apply, const, linear, size
from effcompile.passes.recognize.elements import Index, Reader, Rule, Unreadable, op_name
from effcompile.passes.recognize.rule_args import argument, checked, dtype_of

_INTEGERS = (torch.int64, torch.int32)
_ANYWHERE = size(-1)  # some place along a dimension: what is constant here is constant everywhere


def _index(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    source, chosen = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    assert isinstance(source, fx.Node)
    shape = reader.shape(source)
    chosen += [None] * (len(shape) - len(chosen))
    places = [d for d, item in enumerate(chosen) if item is not None]
    if any(item.meta["val"].dtype == BOOL for item in chosen if isinstance(item, fx.Node)):
        raise Unreadable("indexing by a boolean tensor")
    if places != list(range(places[0], places[-1] + 1)):
        raise Unreadable("advanced indexing with a gap")
    rank = max(len(reader.shape(item)) for item in chosen if isinstance(item, fx.Node))
    inner = index[places[0] : places[0] + rank]
    rest = iter(index[: places[0]] + index[places[0] + rank :])
    moved = tuple(next(rest) if item is None else reader.element(item, inner, at) for item in chosen)
    return _looked_up(reader, source, moved, at)


def _looked_up(reader: Reader, source: fx.Node, index: Index, at: int) -> Expr:
    """Read at computed places; torch wraps negative ones, so only provably non-negative places are looked through."""
    if all(never_negative(place) for place in index):
        return reader.element(source, index, at)
    return reader.leaf(source, index, at)


def never_negative(place: Expr) -> bool:
    """Tell whether a place along a dimension is provably no negative number, which torch would count from the end."""
    terms, number = linear(place)
    return number >= 0 and all(times > 0 and atom.op in ("axis", "size") for atom, times in terms.items())


def _index_select(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = int(node.args[1]) % len(index)  # type: ignore[arg-type]
    place = reader.element(node.args[2], (index[dim],), at)
    return _looked_up(reader, source, (*index[:dim], place, *index[dim + 1 :]), at)


def _embedding(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    row = reader.element(node.args[1], index[:-1], at)
    return _looked_up(reader, source, (row, index[-1]), at)


def _repeat_interleave(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    times, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(times, int) or not isinstance(dim, int):
        return reader.leaf(node, index, at)
    dim %= len(index)
    moved = apply("floordiv", index[dim], const(times))
    return reader.element(node.args[0], (*index[:dim], moved, *index[dim + 1 :]), at)


def _cumsum(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    """Fold the running sum of a constant; a sum of data is a load."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = int(argument(node, 1, "dim")) % len(index)
    anywhere = (*index[:dim], _ANYWHERE, *index[dim + 1 :])
    step = apply("to", reader.element(source, anywhere, at), dtype=checked(node))
    if not step.is_const or step.dtype != INT:
        return reader.leaf(node, index, at)
    return apply("mul", apply("add", index[dim], const(1)), step)


def _diff(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    """Fold the first difference along a dimension, with the optional `prepend`."""
    source, prepend = node.args[0], argument(node, 3, "prepend")
    assert isinstance(source, fx.Node)
    dim = int(argument(node, 2, "dim", -1)) % len(index)
    if argument(node, 1, "n", 1) != 1 or argument(node, 4, "append") is not None or dtype_of(node) not in _INTEGERS:
        return reader.leaf(node, index, at)

    def moved(place: Expr) -> Index:
        return (*index[:dim], place, *index[dim + 1 :])

    here = index[dim]
    if prepend is None:
        after = reader.element(source, moved(apply("add", here, const(1))), at)
        return apply("sub", after, reader.element(source, moved(here), at))
    if reader.shape(prepend)[dim] != 1:
        return reader.leaf(node, index, at)
    before = reader.element(source, moved(apply("sub", here, const(1))), at)
    now = reader.element(source, index, at)
    first = apply("sub", reader.element(source, moved(const(0)), at), reader.element(prepend, moved(const(0)), at))
    step = apply("sub", now, before)
    if step == first:
        return step
    return reader.leaf(node, index, at)


def _cat(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    dim = int(argument(node, 1, "dim", 0)) % len(index)
    here, result = index[dim], checked(node)
    sources = list(node.args[0])  # type: ignore[arg-type]
    begin, value = const(0), None
    pieces: list[tuple[Expr, Expr]] = []
    for source in sources:
        end = apply("add", begin, reader.number(reader.shape(source)[dim]))
        place = (*index[:dim], apply("sub", here, begin), *index[dim + 1 :])
        with reader.unsure():
            pieces.append((apply("lt", here, end), apply("to", reader.element(source, place, at), dtype=result)))
        begin = end
    value = pieces[-1][1]
    for cond, piece in reversed(pieces[:-1]):
        value = apply("where", cond, piece, value)
    return value


def _pad(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    source, widths = node.args[0], list(argument(node, 1, "pad"))
    assert isinstance(source, fx.Node)
    shape, inside, moved = reader.shape(source), const(True), list(index)
    for number, (left, right) in enumerate(zip(widths[::2], widths[1::2])):
        dim = len(shape) - 1 - number
        place = apply("sub", index[dim], reader.number(left))
        moved[dim] = place
        if left != 0:
            inside = apply("and", inside, apply("ge", place, const(0)))
        if right != 0:
            inside = apply("and", inside, apply("lt", place, reader.number(shape[dim])))
    position = 3 if op_name(node) == "pad" else 2
    if position == 3 and argument(node, 2, "mode", "constant") != "constant":
        raise Unreadable("padding that is not constant")
    fill = apply("to", reader.number(argument(node, position, "value", 0) or 0), dtype=checked(node))
    with reader.unsure():
        return apply("where", inside, reader.element(source, tuple(moved), at), fill)


def index_rules() -> dict[str, Rule]:
    """Return these rules by ATen name."""
    table: dict[str, Rule] = {"index": _index, "index_select": _index_select, "embedding": _embedding}
    table |= {"repeat_interleave": _repeat_interleave}
    return table | {"cumsum": _cumsum, "diff": _diff, "cat": _cat, "constant_pad_nd": _pad, "pad": _pad}
