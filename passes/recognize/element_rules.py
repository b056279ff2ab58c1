"""Give each ATen op that mask code uses its meaning at one element.

Views move the index, pointwise ops combine elements, indexing composes. A rule may refuse (`Unreadable`) but never
approximates; an op that is missing here only makes a mask opaque, never wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effcompile.core.expr import BOOL, INT, Expr, apply, const
from effcompile.passes.recognize.elements import Index, Reader, Rule, Unreadable, from_front, op_name, slice_begin
from effcompile.passes.recognize.index_rules import index_rules
from effcompile.passes.recognize.rule_args import argument, checked, dtype_of

_INTEGERS = (torch.int64, torch.int32)


# --- views ---------------------------------------------------------------------------------------------------------


def _same(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    return reader.element(node.args[0], index, at)


def _unsqueeze(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    dim = int(argument(node, 1, "dim")) % len(index)
    return reader.element(node.args[0], index[:dim] + index[dim + 1 :], at)


def _squeeze(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = reader.shape(source)
    dims = argument(node, 1, "dim")
    chosen = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(shape) for d in chosen if shape[d] == 1}
    rest = iter(index)
    return reader.element(source, tuple(const(0) if d in gone else next(rest) for d in range(len(shape))), at)


def _transpose(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    a, b = (int(argument(node, n, f"dim{n - 1}", n - 1)) % len(index) for n in (1, 2))
    moved = list(index)
    moved[a], moved[b] = moved[b], moved[a]
    return reader.element(node.args[0], tuple(moved), at)


def _t(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    return reader.element(node.args[0], tuple(reversed(index)), at)


def _permute(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    moved = list(index)
    for place, dim in enumerate(argument(node, 1, "dims")):
        moved[dim % len(index)] = index[place]
    return reader.element(node.args[0], tuple(moved), at)


def _slice(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = int(argument(node, 1, "dim", 0)) % len(index)
    begin = slice_begin(reader, node, dim, argument(node, 2, "start"))
    moved = apply("add", apply("mul", index[dim], reader.number(argument(node, 4, "step", 1))), begin)
    return reader.element(source, (*index[:dim], moved, *index[dim + 1 :]), at)


def _select(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = reader.shape(source)
    dim = int(argument(node, 1, "dim")) % len(shape)
    place = from_front(shape[dim], argument(node, 2, "index"))
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
        for i, n, times in zip(tail, shape, argument(node, 1, "repeats")[-len(shape) :])
    )
    return reader.element(source, moved, at)


# --- sources -------------------------------------------------------------------------------------------------------


def _arange(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    if dtype_of(node) not in _INTEGERS:
        raise Unreadable("arange of floating point")
    args = node.args
    start = reader.number(args[0]) if len(args) > 1 else const(0)
    step = reader.number(args[2]) if len(args) > 2 else const(1)
    if not step.is_const:
        raise Unreadable("arange with a symbolic step")
    return apply("add", start, apply("mul", index[0], step))


def _filled(position: int, name: str) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
        return apply("to", reader.number(argument(node, position, name)), dtype=checked(node))

    return rule


def _constant(value: int) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
        return const(value, checked(node))

    return rule


def _fill(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    return apply("to", reader.element(node.args[1], (), at), dtype=checked(node))


# --- pointwise ---------------------------------------------------------------------------------------------------------


def _pointwise(name: str, count: int = 2) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
        result = checked(node)
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
    return _combine("sub", [b, a], checked(node))


def _div(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    mode = node.kwargs.get("rounding_mode")
    args = [reader.element(arg, index, at) for arg in node.args[:2]]
    if mode is None:
        return _combine("truediv", args, checked(node))
    if checked(node) != INT:
        raise Unreadable("a rounded division of floating point")
    return _combine("floordiv" if mode == "floor" else "truncdiv", args, INT)


def _floor_divide(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    if checked(node) != INT:
        raise Unreadable("a floor division of floating point")
    return _combine("floordiv", [reader.element(arg, index, at) for arg in node.args[:2]], INT)


def _cast(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    value = reader.element(node.args[0], index, at)
    if value.dtype.is_floating_point and dtype_of(node) in _INTEGERS and not value.is_const:
        return Expr("to", (value,), dtype=INT)
    return apply("to", value, dtype=checked(node))


def _where(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    cond, yes, no = (reader.element(arg, index, at) for arg in node.args[:3])
    result = checked(node)
    return apply("where", apply("to", cond, dtype=BOOL), apply("to", yes, dtype=result), apply("to", no, dtype=result))


def _masked_fill(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    value, mask = (reader.element(arg, index, at) for arg in node.args[:2])
    fill = apply("to", reader.element(node.args[2], (), at), dtype=checked(node))
    return apply("where", mask, fill, value)


def _extreme(name: str) -> Rule:
    """Read the two-operand form of `min` and `max`; a reduction is a load."""

    def rule(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
        if len(node.args) != 2 or not isinstance(node.args[1], fx.Node):
            return reader.leaf(node, index, at)
        return _combine(name, [reader.element(arg, index, at) for arg in node.args], checked(node))

    return rule


def _triangle(upper: bool) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
        value = reader.element(node.args[0], index, at)
        limit = apply("add", index[-2], reader.number(argument(node, 1, "diagonal", 0)))
        kept = apply("ge" if upper else "le", index[-1], limit)
        return apply("where", kept, value, const(0, value.dtype))

    return rule


def _clamp(reader: Reader, node: fx.Node, index: Index, at: int) -> Expr:
    value, result = reader.element(node.args[0], index, at), checked(node)
    name = op_name(node)
    low = argument(node, 1, "min") if name != "clamp_max" else None
    high = argument(node, 2, "max") if name == "clamp" else argument(node, 1, "max") if name == "clamp_max" else None
    for bound, op in ((low, "maximum"), (high, "minimum")):
        if bound is not None:
            value = _combine(op, [value, reader.element(bound, index, at)], result)
    return value


def rules() -> dict[str, Rule]:
    """Return every rule by ATen name; in-place spellings share the rule of the functional one."""
    table: dict[str, Rule] = dict.fromkeys(
        ["alias", "detach", "clone", "contiguous", "expand", "expand_as", "lift_fresh", "lift_fresh_copy", "view_as"],
        _same,
    )
    table |= {"unsqueeze": _unsqueeze, "squeeze": _squeeze, "transpose": _transpose, "t": _t, "permute": _permute}
    table |= {"slice": _slice, "select": _select, "repeat": _repeat}
    table |= dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _reshape)
    table |= {"arange": _arange, "full": _filled(1, "fill_value"), "full_like": _filled(1, "fill_value")}
    table |= {"new_full": _filled(2, "fill_value"), "scalar_tensor": _filled(0, "s")}
    table |= dict.fromkeys(("ones", "new_ones", "ones_like"), _constant(1))
    table |= dict.fromkeys(("zeros", "new_zeros", "zeros_like"), _constant(0))
    table |= {
        name: _pointwise(name)
        for name in ["add", "sub", "mul", "minimum", "maximum", "le", "lt", "ge", "gt", "eq", "ne", "pow"]
    }
    table |= {"logical_not": _pointwise("not", 1), "bitwise_not": _pointwise("not", 1)}
    for kind in ("and", "or", "xor"):
        table |= dict.fromkeys((f"logical_{kind}", f"bitwise_{kind}", f"__{kind}__"), _pointwise(kind))
    table |= {name: _pointwise(name, 1) for name in ("neg", "abs", "log", "exp")}
    table |= {"remainder": _pointwise("mod"), "rsub": _rsub, "div": _div, "floor_divide": _floor_divide}
    table |= dict.fromkeys(("to", "_to_copy", "type_as"), _cast)
    table |= {"where": _where, "masked_fill": _masked_fill, "tril": _triangle(False), "triu": _triangle(True)}
    table |= dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp)
    table |= {"min": _extreme("minimum"), "max": _extreme("maximum"), "fill": _fill}
    return table | index_rules()
