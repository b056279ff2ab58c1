"""Describe one element of a tensor as an expression over (batch, head, query index, key index).

An `Expr` is what a mask means at one position. Constructors fold constants, keep integer sums in one canonical linear form
and turn every integer comparison into `a <= b`, so that two spellings of the same predicate become the same value.
Integers are treated as unbounded: callers build expressions from int32/int64 index arithmetic only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

Scalar = bool | int | float
BOOL, INT, FLOAT = torch.bool, torch.int64, torch.float32
BATCH, HEAD, QUERY, KEY = range(4)
AXES = ("b", "h", "q", "k")
_CASES = 8  # how many constant leaves an operation on `where` trees may distribute over
COMPARE = frozenset({"le", "lt", "ge", "gt", "eq", "ne"})


@dataclass(frozen=True)
class Expr:
    """Hold one operation; `value` is the constant, axis number, size slot or load slot of a leaf."""

    op: str
    args: tuple[Expr, ...] = ()
    value: Scalar | None = None
    dtype: torch.dtype = INT

    def __str__(self) -> str:
        return show(self)

    @property
    def is_const(self) -> bool:
        """Tell whether the expression is a plain number."""
        return self.op == "const"


TRUE = Expr("const", value=True, dtype=BOOL)
FALSE = Expr("const", value=False, dtype=BOOL)


def const(value: Scalar, dtype: torch.dtype | None = None) -> Expr:
    """Return a constant; the dtype follows the Python type unless given."""
    if dtype is None:
        dtype = BOOL if isinstance(value, bool) else INT if isinstance(value, int) else FLOAT
    if dtype == BOOL:
        return TRUE if value else FALSE
    if dtype.is_floating_point:
        return Expr("const", value=float(value), dtype=dtype)
    return Expr("const", value=int(value), dtype=INT)


def axis(number: int) -> Expr:
    """Return the index along BATCH, HEAD, QUERY or KEY."""
    return Expr("axis", value=number)


def size(slot: int) -> Expr:
    """Return a symbolic size: entry `slot` of the mask's size operands."""
    return Expr("size", value=slot)


def load(slot: int, index: tuple[Expr, ...], dtype: torch.dtype) -> Expr:
    """Return one element of entry `slot` of the mask's tensor operands."""
    return Expr("load", index, value=slot, dtype=dtype)


def walk(expr: Expr) -> Iterator[Expr]:
    """Yield every distinct sub-expression, parents first."""
    seen: set[Expr] = set()
    stack = [expr]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack.extend(node.args)


def axes_of(expr: Expr) -> frozenset[int]:
    """Return the axes that the value depends on."""
    return frozenset(int(node.value or 0) for node in walk(expr) if node.op == "axis")


# --- integer sums in one form --------------------------------------------------------------------------------------


def linear(expr: Expr) -> tuple[dict[Expr, int], int]:
    """Return `expr` as ({atom: coefficient}, constant); an atom is anything that is not a sum."""
    if expr.is_const:
        return {}, int(expr.value or 0)
    if expr.op == "add":
        terms: dict[Expr, int] = {}
        total = 0
        for arg in expr.args:
            more, number = linear(arg)
            total += number
            for atom, factor in more.items():
                terms[atom] = terms.get(atom, 0) + factor
        return {atom: factor for atom, factor in terms.items() if factor}, total
    if expr.op == "mul" and expr.args[1].is_const:
        terms, number = linear(expr.args[0])
        factor = int(expr.args[1].value or 0)
        return {atom: times * factor for atom, times in terms.items() if times * factor}, number * factor
    return {expr: 1}, 0


def from_linear(terms: dict[Expr, int], number: int) -> Expr:
    """Return the canonical sum of a linear form."""
    parts = [
        atom if factor == 1 else Expr("mul", (atom, const(factor)))
        for atom, factor in sorted(terms.items(), key=lambda item: show(item[0]))
        if factor
    ]
    if number or not parts:
        parts.append(const(number))
    return parts[0] if len(parts) == 1 else Expr("add", tuple(parts))


def _sum(a: Expr, b: Expr, sign: int) -> Expr:
    terms, number = linear(a)
    terms = dict(terms)
    more, other = linear(b)
    for atom, factor in more.items():
        terms[atom] = terms.get(atom, 0) + sign * factor
    return from_linear(terms, number + sign * other)


def at_most(a: Expr, b: Expr) -> Expr:
    """Return the canonical integer predicate a <= b."""
    terms, number = linear(_sum(a, b, -1))
    if not terms:
        return const(number <= 0)
    divisor = math.gcd(*terms.values())
    terms = {atom: factor // divisor for atom, factor in terms.items()}
    number = -((-number) // divisor)  # sum <= -n  is  sum/g <= floor(-n/g)
    left = {atom: factor for atom, factor in terms.items() if factor > 0}
    right = {atom: -factor for atom, factor in terms.items() if factor < 0}
    return Expr("le", (from_linear(left, 0), from_linear(right, -number)), dtype=BOOL)


# --- construction with folding --------------------------------------------------------------------------------------


def _fold_scalar(op: str, args: tuple[Expr, ...], dtype: torch.dtype) -> Expr:
    """Compute a constant operation with torch itself, so that rounding and casts are torch's own."""
    from effcompile.core.expr_eval import apply_torch

    tensors = [torch.tensor(arg.value, dtype=arg.dtype) for arg in args]
    return const(apply_torch(op, tensors, dtype).item(), dtype)


def apply(op: str, *args: Expr, dtype: torch.dtype | None = None) -> Expr:
    """Return `op(*args)`, simplified. Names: those of `expr_eval.TORCH`; `dtype` is the result's, where it is not implied."""
    dtype = dtype or _result_dtype(op, args)
    if op == "where":
        return _where(*args)
    if op == "to":
        return _cast(args[0], dtype)
    if all(arg.is_const for arg in args):
        return _fold_scalar(op, args, dtype)
    cased = _over_cases(op, args, dtype)
    if cased is not None:
        return cased
    if dtype == BOOL:
        simple = _boolean(op, args)
        return simple if simple is not None else Expr(op, args, dtype=BOOL)
    if dtype == INT:
        return _integer(op, args)
    if op in ("add", "sub") and args[1].is_const and args[1].value == 0:
        return args[0]
    if op == "add" and args[0].is_const and args[0].value == 0:
        return args[1]
    if op == "mul" and args[1].is_const and args[1].value == 1:
        return args[0]
    return Expr(op, args, dtype=dtype)


def _result_dtype(op: str, args: tuple[Expr, ...]) -> torch.dtype:
    if op in COMPARE or op in ("and", "or", "not", "xor"):
        return BOOL
    result = args[0].dtype
    for arg in args[1:]:
        result = torch.promote_types(result, arg.dtype)
    return FLOAT if op in ("truediv", "log", "exp", "tanh") and not result.is_floating_point else result


def _where(cond: Expr, yes: Expr, no: Expr) -> Expr:
    dtype = torch.promote_types(yes.dtype, no.dtype)
    yes, no = _cast(yes, dtype), _cast(no, dtype)
    if cond.is_const:
        return yes if cond.value else no
    if yes == no:
        return yes
    if dtype == BOOL:
        return apply("or", apply("and", cond, yes), apply("and", invert(cond), no))
    return Expr("where", (cond, yes, no), dtype=dtype)


def _cast(value: Expr, dtype: torch.dtype) -> Expr:
    if dtype in (torch.int32, torch.int64):
        dtype = INT
    if value.dtype == dtype:
        return value
    if value.is_const:
        return _fold_scalar("to", (value,), dtype)
    if dtype == BOOL:
        return apply("ne", value, const(0, value.dtype))
    if value.dtype == BOOL:
        return _where(value, const(1, dtype), const(0, dtype))
    if value.op == "where":
        return _where(value.args[0], _cast(value.args[1], dtype), _cast(value.args[2], dtype))
    return Expr("to", (value,), dtype=dtype)


def _cases(value: Expr) -> list[tuple[Expr, Expr]] | None:
    """Split a `where` tree with constant leaves into (condition, leaf) pairs; conditions exclude each other."""
    if value.is_const:
        return [(TRUE, value)]
    if value.op != "where":
        return None
    cond, yes, no = value.args
    left, right = _cases(yes), _cases(no)
    if left is None or right is None or len(left) + len(right) > _CASES:
        return None
    return [(apply("and", cond, c), v) for c, v in left] + [(apply("and", invert(cond), c), v) for c, v in right]


def _over_cases(op: str, args: tuple[Expr, ...], dtype: torch.dtype) -> Expr | None:
    """Distribute an operation over `where` trees whose leaves are constants: `where(c, 0, m) == 0` is `c`."""
    if op in ("and", "or", "not", "xor") or not any(arg.op == "where" for arg in args):
        return None
    split = [_cases(arg) for arg in args]
    if any(cases is None for cases in split):
        return None
    total: list[tuple[Expr, tuple[Expr, ...]]] = [(TRUE, ())]
    for cases in split:
        total = [
            (both, (*leaves, leaf))
            for cond, leaves in total
            for other, leaf in cases or ()
            if (both := apply("and", cond, other)) != FALSE
        ]
        if len(total) > _CASES:
            return None
    results: dict[Expr, Expr] = {}
    for cond, leaves in total:
        leaf = _fold_scalar(op, leaves, dtype)
        results[leaf] = apply("or", results[leaf], cond) if leaf in results else cond
    (last, _), *rest = reversed(results.items())
    value = last
    for leaf, cond in rest:
        value = _where(cond, leaf, value)
    return value


def invert(value: Expr) -> Expr:
    """Return the negation of a boolean expression."""
    if value.is_const:
        return const(not value.value)
    if value.op == "not":
        return value.args[0]
    if value.op == "le" and value.args[0].dtype == INT:
        return at_most(_sum(value.args[1], const(1), 1), value.args[0])
    if value.op in ("and", "or"):
        return apply("or" if value.op == "and" else "and", *(invert(arg) for arg in value.args))
    swap = {"eq": "ne", "ne": "eq"}.get(value.op)
    if swap:
        return Expr(swap, value.args, dtype=BOOL)
    return Expr("not", (value,), dtype=BOOL)


def _boolean(op: str, args: tuple[Expr, ...]) -> Expr | None:
    if op == "not":
        return invert(args[0])
    if op in ("and", "or"):
        unit, zero = (TRUE, FALSE) if op == "and" else (FALSE, TRUE)
        flat: list[Expr] = []
        for arg in args:
            for part in arg.args if arg.op == op else (arg,):
                if part == zero:
                    return zero
                if part != unit and part not in flat:
                    flat.append(part)
        if any(invert(part) in flat for part in flat if part.op in ("le", "not", "eq", "ne")):
            return zero
        flat = _absorb(op, flat)
        if not flat:
            return unit
        return flat[0] if len(flat) == 1 else Expr(op, tuple(flat), dtype=BOOL)
    if op in COMPARE:
        return _comparison(op, *args)
    return None


def _absorb(op: str, parts: list[Expr]) -> list[Expr]:
    """Apply x | (x & y) = x and x | (~x & y) = x | y, and their duals."""
    dual = "and" if op == "or" else "or"
    result: list[Expr] = []
    for part in parts:
        if part.op == dual:
            others = [other for other in parts if other is not part]
            if any(other in part.args for other in others):
                continue
            negated = [invert(other) for other in others if other.op != dual]
            left = [arg for arg in part.args if arg not in negated]
            if len(left) < len(part.args):
                part = apply(dual, *left) if left else const(dual == "and")
        if part not in result:
            result.append(part)
    return result


def _comparison(op: str, a: Expr, b: Expr) -> Expr | None:
    if a.dtype == BOOL or b.dtype == BOOL:
        if a.is_const:
            a, b = b, a
        if b.is_const and b.dtype == BOOL and op in ("eq", "ne"):
            return a if (op == "eq") == bool(b.value) else invert(a)
        return apply(op, _cast(a, INT), _cast(b, INT)) if op in ("eq", "ne") and a.dtype != b.dtype else None
    if a.dtype.is_floating_point or b.dtype.is_floating_point:
        return None
    if op == "le":
        return at_most(a, b)
    if op == "ge":
        return at_most(b, a)
    if op == "lt":
        return at_most(_sum(a, const(1), 1), b)
    if op == "gt":
        return at_most(_sum(b, const(1), 1), a)
    terms, number = linear(_sum(a, b, -1))
    if not terms:
        return const((number == 0) == (op == "eq"))
    left = {atom: factor for atom, factor in terms.items() if factor > 0}
    right = {atom: -factor for atom, factor in terms.items() if factor < 0}
    pair = (from_linear(left, max(number, 0)), from_linear(right, max(-number, 0)))
    if pair[0].is_const or (not pair[1].is_const and show(pair[1]) < show(pair[0])):
        pair = (pair[1], pair[0])
    return Expr(op, pair, dtype=BOOL)


def _integer(op: str, args: tuple[Expr, ...]) -> Expr:
    if op == "add":
        return _sum(args[0], args[1], 1)
    if op == "sub":
        return _sum(args[0], args[1], -1)
    if op == "neg":
        return _sum(const(0), args[0], -1)
    if op == "mul" and any(arg.is_const for arg in args):
        value, number = (args[0], args[1]) if args[1].is_const else (args[1], args[0])
        terms, offset = linear(value)
        factor = int(number.value or 0)
        return from_linear({atom: times * factor for atom, times in terms.items()}, offset * factor)
    if op == "floordiv" and args[1].is_const and args[1].value == 1:
        return args[0]
    return Expr(op, args, dtype=INT)


# --- text ------------------------------------------------------------------------------------------------------------

_INFIX = {
    "le": "<=",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "gt": ">",
    "ge": ">=",
    "add": "+",
    "sub": "-",
    "mul": "*",
    "floordiv": "//",
    "mod": "%",
    "and": "&",
    "or": "|",
    "truediv": "/",
}


def show(expr: Expr) -> str:
    """Print the expression as a person writes it: `(k <= q) & t0[b, k]`."""
    if expr.op == "const":
        return repr(expr.value)
    if expr.op == "axis":
        return AXES[int(expr.value or 0)]
    if expr.op == "size":
        return f"n{expr.value}"
    args = [show(arg) for arg in expr.args]
    if expr.op == "load":
        return f"t{expr.value}[{', '.join(args)}]" if args else f"t{expr.value}"
    if expr.op in _INFIX:
        return "(" + f" {_INFIX[expr.op]} ".join(args) + ")"
    if expr.op == "to":
        return f"{str(expr.dtype).removeprefix('torch.')}({args[0]})"
    return f"{expr.op}({', '.join(args)})"
