"""Narrow a mask by a pattern: intersect, never replace, and never empty a row that had a key.

Patterns speak of the distance to a query's own key. Where that key stands is read from the mask: under `k <= q + o` it is q + o
(chunked prefill, decode), under `k <= positions[q]` it is positions[q] (a static cache). A row whose own key the mask drops,
such as the row of a padded position, keeps all that the mask keeps: whether the pattern would empty it is only known at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

from effcompile.core.expr import KEY, QUERY, TRUE, Expr, apply, axes_of, axis, const, invert, linear, size, walk
from effcompile.core.mask import Mask, bound, from_terms, settle, substitute
from effcompile.core.site import AttentionSite, Refusal

Q, K = axis(QUERY), axis(KEY)


@dataclass(frozen=True)
class Alignment:
    """Hold where each query's own key stands, and the extents, as expressions.

    `own` depends on (b, h, q); `causal` says that the mask lets a query read no key after it. `fresh` is the slot of `k_len` as a
    new size operand, None where the number of keys is known.
    """

    own: Expr
    causal: bool
    q_len: Expr
    k_len: Expr
    fresh: int | None = None


def align(site: AttentionSite, slots: int | None = None) -> Alignment | Refusal:
    """Return how the queries of a self-attention stand to its keys; refuse cross attention, where distance means nothing.

    `slots` is the number of size operands that the call has; None counts those that the mask reads.
    """
    if not isinstance(site.mask, Mask):
        return Refusal("EFF-A103", f"the mask is opaque: {site.mask.reason}")
    if slots is None:
        exprs = (site.mask.keep, site.mask.soft, site.mask.bias or TRUE)
        slots = 1 + max((int(n.value or 0) for expr in exprs for n in walk(expr) if n.op == "size"), default=-1)
    square = str(site.q_len) == str(site.kv_len)
    fresh = None if isinstance(site.kv_len, int) else slots
    k_len = const(site.kv_len) if isinstance(site.kv_len, int) else size(slots)
    q_len = const(site.q_len) if isinstance(site.q_len, int) else k_len if square else size(slots + 1)
    for part in site.mask.parts():
        own = _frontier(part, site.q_len == 1)
        if own is not None:
            return Alignment(own, True, q_len, k_len, fresh)
    if site.cross:
        return Refusal("EFF-A504", "cross attention: queries and keys derive from different inputs")
    if square:
        return Alignment(Q, False, q_len, k_len, fresh)
    if site.q_len == 1:
        return Alignment(apply("sub", k_len, const(1)), True, q_len, k_len, fresh)
    return Refusal("EFF-A504", f"{site.q_len} queries and {site.kv_len} keys without causal order")


def _frontier(part: Expr, single: bool) -> Expr | None:
    """Return E where the condition is k <= E(b, h, q), else None; with one query E need not depend on it."""
    if part.op != "le":
        return None
    terms, number = linear(apply("sub", part.args[1], part.args[0]))
    if terms.pop(K, 0) != -1 or any(KEY in axes_of(atom) for atom in terms):
        return None
    own = from_terms(terms, number)
    return own if single or QUERY in axes_of(own) else None


def window(at: Alignment, width: int, sinks: int = 0) -> Expr:
    """Return the pattern that keeps the `width` keys up to a query's own (on both sides without causal order) and first keys."""
    near = apply("le", apply("sub", at.own, const(width - 1)), K)
    if not at.causal:
        near = apply("and", near, apply("le", K, apply("add", at.own, const(width - 1))))
    return apply("or", near, apply("le", K, const(sinks - 1))) if sinks else near


def narrow(mask: Mask, pattern: Expr, at: Alignment, *, sink: bool) -> Mask:
    """Return the mask with a pattern that contains each query's own key, and key 0 if `sink`.

    Rows for which neither is kept by the mask stay as they are, so that a row is empty only where it was before.
    """
    alive = settle(substitute(mask.keep, K, _inside(at)), at.q_len, at.k_len)
    if sink and alive != TRUE:
        alive = apply("or", alive, settle(substitute(mask.keep, K, const(0)), at.q_len, at.k_len))
    rule = pattern if alive == TRUE else apply("or", pattern, invert(alive))
    return Mask(apply("and", mask.keep, rule), mask.bias, mask.fill, mask.empty_row, mask.soft)


def _inside(at: Alignment) -> Expr:
    """Return the place of the own key, clamped into the range of keys unless it is proved to lie there."""
    last = apply("sub", at.k_len, const(1))
    low, high = (bound(at.own, at.q_len, at.k_len, upper=upper) for upper in (False, True))
    proved = low is not None and high is not None
    if proved and settle(apply("le", high, last), at.q_len, at.k_len) == TRUE:  # type: ignore[arg-type]
        if settle(apply("le", const(0), low), at.q_len, at.k_len) == TRUE:  # type: ignore[arg-type]
            return at.own
    return apply("minimum", apply("maximum", at.own, const(0)), last)
