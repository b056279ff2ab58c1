"""Say which keys a query may read, as a predicate; never as a tensor.

A `Mask` is `keep` over (b, h, q, k) plus an optional score addend `bias`, the fill value that the source used, and what a
row without any kept key gives. These belong to the mask: transformers' additive masks fill with finfo.min, so that an empty
row becomes the mean of V, while a boolean mask gives 0 there. `Opaque` is a mask that could not be proved: it stays a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from effcompile.core.expr import BATCH, HEAD, KEY, QUERY, TRUE, Expr, apply, axes_of, axis, const, linear, show, walk

EmptyRow = Literal["zero", "uniform", "nan", "never"]


@dataclass(frozen=True)
class Mask:
    """Hold a proved mask. `soft` are the keys that an empty row averages over (only where `empty_row` is `uniform`)."""

    keep: Expr = TRUE
    bias: Expr | None = None
    fill: str = "bool"
    empty_row: EmptyRow = "never"
    soft: Expr = TRUE

    @property
    def is_full(self) -> bool:
        """Tell whether every query reads every key with no addend."""
        return self.keep == TRUE and self.bias is None

    def parts(self) -> tuple[Expr, ...]:
        """Return the conditions that must all hold."""
        return self.keep.args if self.keep.op == "and" else () if self.keep == TRUE else (self.keep,)

    def __str__(self) -> str:
        names = [describe(part) for part in self.parts()] or ["full"]
        if self.bias is not None:
            names.append(f"bias({'alibi' if is_alibi(self.bias) else 'relative' if relative(self.bias) else 'score'})")
        return " & ".join(names)


@dataclass(frozen=True)
class Opaque:
    """Hold a mask that is honoured as the tensor it is, and why it could not be proved."""

    reason: str
    dtype: str = "bool"

    def __str__(self) -> str:
        return f"opaque({self.reason})"


AnyMask = Mask | Opaque
Q, K, B, H = axis(QUERY), axis(KEY), axis(BATCH), axis(HEAD)
CAUSAL = Mask(keep=apply("le", K, Q))


def causal_offset(part: Expr) -> Expr | None:
    """Return `o` where the condition is k <= q + o, else None."""
    if part.op != "le":
        return None
    terms, number = linear(apply("sub", part.args[1], part.args[0]))
    if (
        terms.pop(Q, 0) != 1
        or terms.pop(K, 0) != -1
        or not all(atom.op in ("size", "signed", "load") for atom in terms)
    ):
        return None
    return from_terms(terms, number)


def window_left(part: Expr) -> Expr | None:
    """Return `w` where the condition is k >= q - w, else None."""
    if part.op != "le":
        return None
    terms, number = linear(apply("sub", part.args[1], part.args[0]))
    if (
        terms.pop(Q, 0) != -1
        or terms.pop(K, 0) != 1
        or not all(atom.op in ("size", "signed", "load") for atom in terms)
    ):
        return None
    return from_terms(terms, number)


def window_both(part: Expr) -> Expr | None:
    """Return `w` where the condition is |q - k| <= w, else None."""
    if part.op != "le" or part.args[0].op != "abs" or axes_of(part.args[1]):
        return None
    terms, number = linear(part.args[0].args[0])
    return (
        part.args[1]
        if number == 0 and sorted((terms.get(Q, 0), terms.get(K, 0))) == [-1, 1] and len(terms) == 2
        else None
    )


def from_terms(terms: dict[Expr, int], number: int) -> Expr:
    """Return the sum of a linear form as an expression."""
    total = const(number)
    for atom, factor in terms.items():
        total = apply("add", total, apply("mul", atom, const(factor)))
    return total


def key_padding_slot(part: Expr) -> int | None:
    """Return the load slot where the condition is `t[b, k]` (or `t[b, k] != 0`, `t[k]`), else None."""
    if part.op == "ne" and const(0) in part.args:
        part = next(arg for arg in part.args if arg != const(0)) if part.args != (const(0),) * 2 else part
    if part.op == "load" and axes_of(part) <= {BATCH, KEY} and KEY in axes_of(part):
        return int(part.value or 0) if all(arg.op in ("axis", "const") for arg in part.args) else None
    return None


def document_slot(part: Expr) -> int | None:
    """Return the load slot where the condition is `t[b, q] == t[b, k]`, else None."""
    if part.op != "eq" or any(arg.op != "load" for arg in part.args):
        return None
    left, right = part.args
    return int(left.value or 0) if left.value == right.value and _swapped(left) == right else None


def chunk_size(part: Expr) -> Expr | None:
    """Return `c` where the condition is q // c == k // c, else None."""
    if part.op != "eq" or any(arg.op != "floordiv" for arg in part.args):
        return None
    left, right = part.args
    return left.args[1] if left.args[1] == right.args[1] and {left.args[0], right.args[0]} == {Q, K} else None


def prefix_limit(part: Expr) -> Expr | None:
    """Return `p` where the condition is (k <= q + o) | (k < p), else None."""
    if part.op != "or" or len(part.args) != 2:
        return None
    causal = [p for p in part.args if causal_offset(p) is not None]
    other = [p for p in part.args if p.op == "le" and p not in causal and axes_of(p) <= {BATCH, KEY}]
    if len(causal) != 1 or len(other) != 1:
        return None
    terms, number = linear(apply("sub", other[0].args[1], other[0].args[0]))
    return from_terms(terms, number + 1) if terms.pop(K, 0) == -1 else None


def _swapped(expr: Expr) -> Expr:
    if expr == Q:
        return K
    if expr == K:
        return Q
    return Expr(expr.op, tuple(_swapped(arg) for arg in expr.args), expr.value, expr.dtype)


def describe(part: Expr) -> str:
    """Name one condition in the field's words; what has no name is shown as it is."""
    if (offset := causal_offset(part)) is not None:
        return "causal" if offset == const(0) else f"causal(offset={show(offset)})"
    if (left := window_left(part)) is not None:
        return f"window({show(left)})"
    if (width := window_both(part)) is not None:
        return f"window(+-{show(width)})"
    if key_padding_slot(part) is not None:
        return "key-padding"
    if document_slot(part) is not None:
        return "document"
    if (chunk := chunk_size(part)) is not None:
        return f"chunk({show(chunk)})"
    if prefix_limit(part) is not None:
        return "prefix"
    return show(part)


def is_alibi(bias: Expr) -> bool:
    """Tell whether the addend is a slope per head times a key position or distance."""
    return any(
        node.op == "mul"
        and any(HEAD in axes_of(arg) and KEY not in axes_of(arg) for arg in node.args)
        and any(KEY in axes_of(arg) and HEAD not in axes_of(arg) for arg in node.args)
        for node in walk(bias)
    )


def relative(bias: Expr) -> bool:
    """Tell whether the addend looks up a table by the distance between query and key."""
    return any(node.op == "load" and any({QUERY, KEY} <= axes_of(arg) for arg in node.args) for node in walk(bias))


def bound(expr: Expr, q_len: Expr, k_len: Expr, *, upper: bool) -> Expr | None:
    """Return the largest (or smallest) value of an integer sum over the index range, or None where loads take part."""
    terms, number = linear(expr)
    total = const(number)
    last = {Q: apply("sub", q_len, const(1)), K: apply("sub", k_len, const(1))}
    for atom, factor in terms.items():
        if atom in last:
            total = apply("add", total, apply("mul", last[atom], const(factor))) if (factor > 0) == upper else total
        elif atom.op == "size":
            total = apply("add", total, apply("mul", atom, const(factor)))
        else:
            return None
    return total


def _never_positive(expr: Expr) -> bool:
    terms, number = linear(expr)
    return number <= 0 and all(factor <= 0 and atom.op == "size" for atom, factor in terms.items())


def settle(keep: Expr, q_len: Expr, k_len: Expr) -> Expr:
    """Drop conditions that hold for every index in range: a causal mask over one query that sits last is full."""
    if keep.op in ("and", "or"):
        return apply(keep.op, *(settle(part, q_len, k_len) for part in keep.args))
    if keep.op == "le":
        slack = apply("sub", keep.args[0], keep.args[1])
        most = bound(slack, q_len, k_len, upper=True)
        if most is not None and _never_positive(most):
            return TRUE
        least = bound(slack, q_len, k_len, upper=False)
        if least is not None and _never_positive(apply("sub", const(1), least)):
            return const(False)
    return keep


def substitute(expr: Expr, old: Expr, new: Expr) -> Expr:
    """Replace a sub-expression, simplifying on the way up."""
    if expr == old:
        return new
    if not expr.args:
        return expr
    args = tuple(substitute(arg, old, new) for arg in expr.args)
    if expr.op == "load":
        return Expr("load", args, expr.value, expr.dtype)
    if expr.op in ("add", "mul") and expr.dtype == const(0).dtype:
        total = args[0]
        for arg in args[1:]:
            total = apply(expr.op, total, arg)
        return total
    return apply(expr.op, *args, dtype=expr.dtype)


def diagonal_kept(keep: Expr, q_len: Expr, k_len: Expr) -> bool:
    """Tell whether every query provably keeps a key: the one at its own index, or at the causal offset."""
    if q_len == k_len and settle(substitute(keep, K, Q), q_len, k_len) == TRUE:
        return True
    first = settle(substitute(keep, K, const(0)), q_len, k_len)
    return first == TRUE
