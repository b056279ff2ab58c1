"""Give each ATen op that mask code uses its meaning at one element.

Views move the index, pointwise ops combine elements, indexing composes. A rule may refuse (`Unreadable`) but never
approximates; an op that is missing here only makes a mask opaque, never wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effcompile.core.expr import BOOL, INT, Expr, apply, const, linear
from effcompile.passes.recognize.elements import Index, Reader, Rule, Unreadable, op_name, slice_bounds

_INTEGERS = (torch.int64, torch.int32)


def _arg(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def _checked(node: fx.Node) -> torch.dtype:
    dtype = _dtype(node)
    if dtype == BOOL or dtype.is_floating_point:
        return dtype
    if dtype in _INTEGERS:
        return INT
    raise Unreadable(f"`{node.name}` computes in {dtype}")


# --- views ---------------------------------------------------------------------------------------------------------


def _same(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    return reader.element(node.args[0], index, at)


def _unsqueeze(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    dim = int(_arg(node, 1, "dim")) % len(index)
    return reader.element(node.args[0], index[:dim] + index[dim + 1 :], at)


def _squeeze(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = reader.shape(source)
    dims = _arg(node, 1, "dim")
    chosen = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(shape) for d in chosen if shape[d] == 1}
    rest = iter(index)
    return reader.element(source, tuple(const(0) if d in gone else next(rest) for d in range(len(shape))), at)


def _transpose(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    a, b = (int(_arg(node, n, f"dim{n - 1}", n - 1)) % len(index) for n in (1, 2))
    moved = list(index)
    moved[a], moved[b] = moved[b], moved[a]
    return reader.element(node.args[0], tuple(moved), at)


def _t(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    return reader.element(node.args[0], tuple(reversed(index)), at)


def _permute(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    moved = list(index)
    for place, dim in enumerate(_arg(node, 1, "dims")):
        moved[dim % len(index)] = index[place]
    return reader.element(node.args[0], tuple(moved), at)


def _slice(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = int(_arg(node, 1, "dim", 0)) % len(index)
    args = [_arg(node, n, name) for n, name in ((2, "start"), (3, "end"), (4, "step"))]
    args = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    begin, _, step = slice_bounds(reader, reader.shape(source)[dim], *args)
    moved = apply("add", apply("mul", index[dim], const(step)), begin)
    return reader.element(source, (*index[:dim], moved, *index[dim + 1 :]), at)


def _select(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = reader.shape(source)
    dim, place = int(_arg(node, 1, "dim")) % len(shape), _arg(node, 2, "index")
    if isinstance(place, int) and place < 0:
        place = shape[dim] + place
    return reader.element(source, (*index[:dim], reader.number(place), *index[dim:]), at)


def _reshape(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    """Handle reshapes that only add or drop dimensions of extent 1, or split and join statically known ones."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    old, new = reader.shape(source), reader.shape(node)
    if [n for n in old if not _is_one(n)] == [n for n in new if not _is_one(n)]:
        kept = iter(i for i, n in zip(index, new) if not _is_one(n))
        return reader.element(source, tuple(const(0) if _is_one(n) else next(kept) for n in old), at)
    if not all(isinstance(n, int) for n in (*old, *new)):
        raise Unreadable("a reshape that joins dimensions of symbolic size")
    flat = const(0)
    for place, extent in zip(index, new):
        flat = apply("add", apply("mul", flat, const(extent)), place)
    parts: list[Expr] = []
    for extent in reversed(old):
        parts.append(apply("mod", flat, const(extent)))
        flat = apply("floordiv", flat, const(extent))
    return reader.element(source, tuple(reversed(parts)), at)


def _is_one(extent: Any) -> bool:
    return isinstance(extent, int) and extent == 1


def _repeat(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = reader.shape(source)
    tail = index[len(index) - len(shape) :]
    moved = tuple(
        i if times == 1 else const(0) if _is_one(n) else apply("mod", i, reader.number(n))
        for i, n, times in zip(tail, shape, _arg(node, 1, "repeats")[-len(shape) :])
    )
    return reader.element(source, moved, at)


# --- sources -------------------------------------------------------------------------------------------------------


def _arange(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    if _dtype(node) not in _INTEGERS:
        raise Unreadable("arange of floating point")
    args = node.args
    start = reader.number(args[0]) if len(args) > 1 else const(0)
    step = reader.number(args[2]) if len(args) > 2 else const(1)
    if not step.is_const:
        raise Unreadable("arange with a symbolic step")
    return apply("add", start, apply("mul", index[0], step))


def _filled(position: int, name: str) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
        return apply("to", reader.number(_arg(node, position, name)), dtype=_checked(node))

    return rule


def _constant(value: int) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
        return const(value, _checked(node))

    return rule


def _fill(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    return apply("to", reader.element(node.args[1], (), at), dtype=_checked(node))


# --- pointwise ---------------------------------------------------------------------------------------------------------


def _pointwise(name: str, count: int = 2) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
        result = _checked(node)
        args = [reader.element(arg, index, at) for arg in node.args[:count]]
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 and name in ("add", "sub") else 1)
        if name in ("add", "sub") and alpha != 1:
            args[1] = apply("mul", args[1], reader.number(alpha))
        return _combine(name, args, result)

    return rule


def _combine(name: str, args: list[Expr], result: torch.dtype) -> Expr:
    if name in ("and", "or", "xor", "not") or name in ("le", "lt", "ge", "gt", "eq", "ne"):
        if name in ("and", "or", "xor", "not") and any(arg.dtype != BOOL for arg in args):
            if result != BOOL:
                raise Unreadable(f"bitwise {name} of integers")
            args = [apply("to", arg, dtype=BOOL) for arg in args]
        elif name not in ("and", "or", "xor", "not"):
            wide = args[0].dtype
            for arg in args[1:]:
                wide = torch.promote_types(wide, arg.dtype)
            if wide != BOOL:
                wide = _of_tensor(args, wide)
                args = [apply("to", arg, dtype=wide) for arg in args]
        return apply(name, *args)
    if result == BOOL:
        if name == "mul":
            return apply("and", *args)
        if name == "add":
            return apply("or", *args)
        raise Unreadable(f"`{name}` of booleans")
    return apply(name, *(apply("to", arg, dtype=result) for arg in args), dtype=result)


def _of_tensor(args: list[Expr], wide: torch.dtype) -> torch.dtype:
    """Compare in the tensor's floating dtype: a Python number does not widen it."""
    floats = [arg.dtype for arg in args if arg.dtype.is_floating_point and not arg.is_const]
    return floats[0] if len(set(floats)) == 1 else wide


def _rsub(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    a, b = (reader.element(arg, index, at) for arg in node.args[:2])
    return _combine("sub", [b, a], _checked(node))


def _div(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    mode = node.kwargs.get("rounding_mode")
    args = [reader.element(arg, index, at) for arg in node.args[:2]]
    if mode is None:
        return _combine("truediv", args, _checked(node))
    if _checked(node) != INT:
        raise Unreadable("a rounded division of floating point")
    return _combine("floordiv" if mode == "floor" else "truncdiv", args, INT)


def _floor_divide(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    if _checked(node) != INT:
        raise Unreadable("a floor division of floating point")
    return _combine("floordiv", [reader.element(arg, index, at) for arg in node.args[:2]], INT)


def _cast(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    value = reader.element(node.args[0], index, at)
    if value.dtype.is_floating_point and _dtype(node) in _INTEGERS and not value.is_const:
        return Expr("to", (value,), dtype=INT)
    return apply("to", value, dtype=_checked(node))


def _where(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    cond, yes, no = (reader.element(arg, index, at) for arg in node.args[:3])
    result = _checked(node)
    return apply("where", apply("to", cond, dtype=BOOL), apply("to", yes, dtype=result), apply("to", no, dtype=result))


def _masked_fill(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    value, mask = (reader.element(arg, index, at) for arg in node.args[:2])
    fill = apply("to", reader.element(node.args[2], (), at), dtype=_checked(node))
    return apply("where", mask, fill, value)


def _triangle(upper: bool) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
        value = reader.element(node.args[0], index, at)
        limit = apply("add", index[-2], reader.number(_arg(node, 1, "diagonal", 0)))
        kept = apply("ge" if upper else "le", index[-1], limit)
        return apply("where", kept, value, const(0, value.dtype))

    return rule


def _clamp(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    value, result = reader.element(node.args[0], index, at), _checked(node)
    name = op_name(node)
    low = _arg(node, 1, "min") if name != "clamp_max" else None
    high = _arg(node, 2, "max") if name == "clamp" else _arg(node, 1, "max") if name == "clamp_max" else None
    for bound, op in ((low, "maximum"), (high, "minimum")):
        if bound is not None:
            value = _combine(op, [value, reader.element(bound, index, at)], result)
    return value


# --- indexing and scans -----------------------------------------------------------------------------------------------


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
    if all(_never_negative(place) for place in index):
        return reader.element(source, index, at)
    return reader.leaf(source, index)


def _never_negative(place: Expr) -> bool:
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


def _cumsum(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    """Fold the running sum of a constant; a sum of data is a load."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = int(_arg(node, 1, "dim")) % len(index)
    step = apply("to", reader.element(source, index, at), dtype=_checked(node))
    if not step.is_const or step.dtype != INT:
        return reader.leaf(node, index)
    return apply("mul", apply("add", index[dim], const(1)), step)


def _diff(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    """Fold the first difference along a dimension, with the optional `prepend`."""
    source, prepend = node.args[0], _arg(node, 3, "prepend")
    assert isinstance(source, fx.Node)
    dim = int(_arg(node, 2, "dim", -1)) % len(index)
    if _arg(node, 1, "n", 1) != 1 or _arg(node, 4, "append") is not None or _dtype(node) not in _INTEGERS:
        return reader.leaf(node, index)

    def moved(place: Expr) -> Index:
        return (*index[:dim], place, *index[dim + 1 :])

    here = index[dim]
    if prepend is None:
        after = reader.element(source, moved(apply("add", here, const(1))), at)
        return apply("sub", after, reader.element(source, moved(here), at))
    if reader.shape(prepend)[dim] != 1:
        return reader.leaf(node, index)
    before = reader.element(source, moved(apply("sub", here, const(1))), at)
    now = reader.element(source, index, at)
    first = apply("sub", reader.element(source, moved(const(0)), at), reader.element(prepend, moved(const(0)), at))
    step = apply("sub", now, before)
    if step == first:
        return step
    return reader.leaf(node, index)


def _cat(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    dim = int(_arg(node, 1, "dim", 0)) % len(index)
    here, result = index[dim], _checked(node)
    sources = list(node.args[0])  # type: ignore[arg-type]
    begin, value = const(0), None
    pieces: list[tuple[Expr, Expr]] = []
    for source in sources:
        end = apply("add", begin, reader.number(reader.shape(source)[dim]))
        place = (*index[:dim], apply("sub", here, begin), *index[dim + 1 :])
        pieces.append((apply("lt", here, end), apply("to", reader.element(source, place, at), dtype=result)))
        begin = end
    value = pieces[-1][1]
    for cond, piece in reversed(pieces[:-1]):
        value = apply("where", cond, piece, value)
    return value


def _pad(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    source, widths = node.args[0], list(_arg(node, 1, "pad"))
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
    fill = apply("to", reader.number(_arg(node, 2, "value", 0) or 0), dtype=_checked(node))
    return apply("where", inside, reader.element(source, tuple(moved), at), fill)


def rules() -> dict[str, Rule]:
    """Return every rule by ATen name; in-place spellings share the rule of the functional one."""
    table: dict[str, Rule] = {
        name: _same
        for name in "alias detach clone contiguous expand expand_as lift_fresh lift_fresh_copy view_as".split()
    }
    table |= {"unsqueeze": _unsqueeze, "squeeze": _squeeze, "transpose": _transpose, "t": _t, "permute": _permute}
    table |= {"slice": _slice, "select": _select, "repeat": _repeat}
    table |= dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _reshape)
    table |= {"arange": _arange, "full": _filled(1, "fill_value"), "full_like": _filled(1, "fill_value")}
    table |= {"new_full": _filled(2, "fill_value"), "scalar_tensor": _filled(0, "s")}
    table |= dict.fromkeys(("ones", "new_ones", "ones_like"), _constant(1))
    table |= dict.fromkeys(("zeros", "new_zeros", "zeros_like"), _constant(0))
    table |= {name: _pointwise(name) for name in "add sub mul minimum maximum le lt ge gt eq ne pow".split()}
    table |= {"logical_not": _pointwise("not", 1), "bitwise_not": _pointwise("not", 1)}
    for kind in ("and", "or", "xor"):
        table |= dict.fromkeys((f"logical_{kind}", f"bitwise_{kind}", f"__{kind}__"), _pointwise(kind))
    table |= {name: _pointwise(name, 1) for name in ("neg", "abs", "log", "exp")}
    table |= {"remainder": _pointwise("mod"), "rsub": _rsub, "div": _div, "floor_divide": _floor_divide}
    table |= dict.fromkeys(("to", "_to_copy", "type_as"), _cast)
    table |= {"where": _where, "masked_fill": _masked_fill, "tril": _triangle(False), "triu": _triangle(True)}
    table |= dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp)
    table |= {"index": _index, "index_select": _index_select, "embedding": _embedding, "cumsum": _cumsum}
    table |= {"diff": _diff, "cat": _cat, "constant_pad_nd": _pad, "pad": _pad, "fill": _fill}
    return table
