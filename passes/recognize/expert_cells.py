"""Read the tensors of one-hot dispatch with capacity: products with a tensor of [S, E, C], and what fills it.

Dimensions are followed by their role, a letter each: s tokens, e experts, c places, k the choices of a token that a sum runs over.
So einsum, matmul, bmm and tensordot, any layout of [S, E, C], and outer products by einsum or by broadcasting are read alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.expert_parts import COPIES, Stop, shape
from effcompile.passes.recognize.match import same_size

CODE = "EFF-M107"
_TESTS = ("ne", "gt")
_PRODUCTS = ("matmul", "mm", "bmm")
_RESHAPES = ("view", "reshape", "flatten", "_unsafe_view")
_TURNS = ("permute", "transpose", "t", "numpy_T", "movedim")
NEAR = 64  # nodes that are looked at for one-hot rows
Step: TypeAlias = torch.dtype | str


@dataclass(frozen=True)
class Contraction:
    """Hold a product of `cells`, the tensor of [S, E, C] whose dimensions have the roles `order`, and `other`.

    It sends tokens where other is x `[S, M]` and the result `[E, C, M]`; it brings results back where other is `[E, C, M]` and the
    result `[S, M]`. `flat`: that `[E, C, M]` is `[E * C, M]`.
    """

    cells: fx.Node
    order: str
    other: fx.Node
    flat: bool = False


@dataclass(frozen=True)
class Term:
    """Hold one choice: a factor `[S, E]` that is 0 outside `ids`, one `[S, C]` that is 0 outside `places`, maybe one `[S]`.

    With a `column` the factors are `[S, k, E]`, `[S, k, C]` and ids and places `[S, k]`, of which this is one column; of `token`,
    `[S, k]` or `[S]`, too where `by_choice`.
    """

    expert: fx.Node
    ids: fx.Node
    place: fx.Node
    places: fx.Node
    token: fx.Node | None
    column: int | None = None
    by_choice: bool = False


@dataclass(frozen=True)
class Cells:
    """Hold what fills `[S, E, C]`: terms, and what is done to their sum in turn: casts and comparisons with 0, which keep 0."""

    terms: tuple[Term, ...]
    steps: tuple[Step, ...]


def equation(node: fx.Node) -> tuple[tuple[str, ...], str, tuple[fx.Node, ...]] | None:
    """Return the letters of an einsum's operands and result, and the operands."""
    if op_name(node) != "einsum":
        return None
    given, arrow, result = str(node.args[0]).replace(" ", "").partition("->")
    letters = tuple(given.split(","))
    plain = arrow and all(item.isalpha() and len(set(item)) == len(item) for item in (*letters, result))
    return (letters, result, tuple(node.args[1])) if plain else None  # type: ignore[arg-type]


def from_one_hot(node: fx.Node) -> bool:
    """Tell whether there are one-hot rows near a node, on the way back."""
    near, known = [node], {node}
    while near and len(known) < NEAR:
        near = [arg for item in near for arg in item.all_input_nodes if arg not in known]
        known.update(near)
        if any(op_name(item) == "one_hot" for item in near):
            return True
    return False


def brings(node: fx.Node) -> Contraction | None:
    """Return a node that brings results back from places of experts, `sec,ecm->sm` in some spelling, else None."""
    return next(_known(node, back=True), None)


def sends(node: fx.Node) -> Contraction | None:
    """Return a node that sends tokens to places of experts, `sec,sm->ecm` in some spelling, else None."""
    return next(_known(node, back=False), None)


def _known(node: fx.Node, back: bool) -> Iterator[Contraction]:
    """Yield contractions near one-hot rows. Other products than einsums are many: of these only what can be read counts."""
    for found in _contractions(node, back):
        if from_one_hot(found.cells):
            try:
                if op_name(node) != "einsum":
                    read_cells(found.cells, found.order)
            except Stop:
                continue
            yield found


def _contractions(node: fx.Node, back: bool) -> Iterator[Contraction]:
    name = op_name(node)
    if (found := equation(node)) is not None and len(found[0]) == 2:
        letters, result, (first, second) = found
        for (cells, other), (a, b) in ((letters, (first, second)), (letters[::-1], (second, first))):
            yield from _by_letters(cells, other, result, a, b, back)
    elif name in _PRODUCTS and len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args):
        yield from _by_product(node, node.args[0], node.args[1], back)  # type: ignore[arg-type]
    elif name == "tensordot" and len(node.args) == 4:
        a, b, over, beside = node.args
        yield from _by_dims(a, b, over, beside, back)  # type: ignore[arg-type]
    elif name == "sum" and back and isinstance(node.args[0], fx.Node) and op_name(node.args[0]) == "bmm":
        # Over the experts: [E, S, C] times [E, C, M].
        if list(_dims(node.args[1:2])) == [0] and len(node.args) == 2 and not node.kwargs:
            cells, other = node.args[0].args
            yield Contraction(cells, "esc", other)  # type: ignore[arg-type]


def _by_dims(a: fx.Node, b: fx.Node, over: Sequence[int], beside: Sequence[int], back: bool) -> Iterator[Contraction]:
    ranks = len(shape(a)), len(shape(b))
    if ranks != ((3, 3) if back else (3, 2)):
        return
    pairs = [(place % 3, other % ranks[1]) for place, other in zip(over, beside)]
    if back and sorted(other for _, other in pairs) == [0, 1]:
        order = ["s", "s", "s"]
        for place, other in pairs:
            order[place] = "ec"[other]
        yield Contraction(a, "".join(order), b)
    elif not back and len(pairs) == 1 and pairs[0][1] == 0:
        order = ["e", "c"]
        order.insert(pairs[0][0], "s")
        yield Contraction(a, "".join(order), b)


def _dims(given: Sequence[Any]) -> list[int]:
    dims = given[0] if given else ()
    return [dims] if isinstance(dims, int) else list(dims or ())


def _by_letters(
    cells: str, other: str, result: str, first: fx.Node, second: fx.Node, back: bool
) -> Iterator[Contraction]:
    wide, slim = (other, result) if back else (result, other)
    if len(cells) != 3 or len(wide) != 3 or len(slim) != 2 or slim[1] != wide[2] or slim[1] in cells:
        return
    if {slim[0], wide[0], wide[1]} == set(cells):
        roles = {slim[0]: "s", wide[0]: "e", wide[1]: "c"}
        yield Contraction(first, "".join(roles[letter] for letter in cells), second)


def _by_product(node: fx.Node, left: fx.Node, right: fx.Node, back: bool) -> Iterator[Contraction]:
    ranks = len(shape(left)), len(shape(right))
    if back:
        if ranks == (2, 2):
            for cells, order in _unfolded(left, ("s", "ec")):
                yield Contraction(cells, order, right, flat=True)
    elif ranks == (3, 2):
        yield Contraction(left, "ecs", right)
    elif ranks == (3, 3):
        x = right.args[0] if op_name(right) == "expand" else None
        x = x.args[0] if isinstance(x, fx.Node) and op_name(x) == "unsqueeze" and x.args[1] in (0, -3) else x
        if isinstance(x, fx.Node) and len(shape(x)) == 2:  # the same tokens for every expert
            yield Contraction(left, "ecs", x)
    elif ranks == (2, 2):
        for cells, order in _unfolded(left, ("ec", "s")):
            yield Contraction(cells, order, right, flat=True)


def _unfolded(node: fx.Node, roles: tuple[str, str]) -> Iterator[tuple[fx.Node, str]]:
    """Yield the three-dimensional tensor that a matrix with one side for two roles was reshaped from, and its order."""
    while (turned := _turn(node)) is not None:
        node, places = turned
        roles = roles[places.index(0)], roles[places.index(1)]
    if op_name(node) not in _RESHAPES or not isinstance(node.args[0], fx.Node) or len(shape(node.args[0])) != 3:
        return
    source, at = node.args[0], roles.index("s")
    if same_size(shape(source)[0 if at == 0 else 2], shape(node)[at]):
        yield source, "sec" if at == 0 else "ecs"


def _turn(node: fx.Node) -> tuple[fx.Node, list[int]] | None:
    """Return what a node permutes, and for each of its dimensions that of the source."""
    name = op_name(node)
    if name not in _TURNS or not isinstance(node.args[0], fx.Node):
        return None
    source, rank = node.args[0], len(shape(node.args[0]))
    places = list(range(rank))
    if name == "permute":
        places = [int(place) % rank for place in node.args[1]]  # type: ignore[union-attr]
    elif name == "transpose":
        a, b = (int(place) % rank for place in node.args[1:3])  # type: ignore[arg-type]
        places[a], places[b] = b, a
    elif name in ("t", "numpy_T"):
        places.reverse()
    else:
        return None
    return source, places


def _source_order(places: list[int], order: str) -> str:
    """Return the roles of a source's dimensions from those of what permutes it."""
    found = [""] * len(places)
    for role, place in zip(order, places):
        found[place] = role
    return "".join(found)


def read_cells(node: fx.Node, order: str) -> Cells:
    """Read what fills `[S, E, C]`, back from what reads it; `order` are the roles of its dimensions.

    Raises:
        Stop: EFF-M107 where that is not proved to be one cell for each choice of a token.
    """
    steps: list[Step] = []
    while isinstance(node.args[0], fx.Node):
        name = op_name(node)
        if name in _TESTS and node.args[1:] == (0,):
            steps.append(name)
        elif name in (*COPIES, "type_as"):
            if node.meta["val"].dtype != node.args[0].meta["val"].dtype:
                steps.append(node.meta["val"].dtype)
        elif (turned := _turn(node)) is not None:
            order = _source_order(turned[1], order)
        else:
            break
        node = node.args[0]
    return Cells(tuple(_terms(node, order, dict(zip(order, shape(node))))), tuple(reversed(steps)))


def _terms(node: fx.Node, order: str, sizes: Mapping[str, Any]) -> Iterator[Term]:
    if op_name(node) in ("add", "add_") and not node.kwargs and all(isinstance(arg, fx.Node) for arg in node.args[:2]):
        for arg in node.args[:2]:
            if len(shape(arg)) != len(order):  # type: ignore[arg-type]
                raise Stop(CODE, "terms of one-hot rows are broadcast against each other")
            yield from _terms(arg, order, sizes)  # type: ignore[arg-type]
        return
    if (turned := _turn(node)) is not None:
        yield from _terms(turned[0], _source_order(turned[1], order), sizes)
        return
    factors = [_straight(*item) for item in _factors(node, order)]
    found: dict[str, list[tuple[fx.Node, str]]] = {"s": [], "e": [], "c": []}
    for item, letters in factors:
        kind = {"s": "s", "sk": "s", "se": "e", "ske": "e", "sc": "c", "skc": "c"}.get(letters)
        if kind is None or not all(same_size(size, sizes.get(role, size)) for role, size in zip(letters, shape(item))):
            raise Stop(CODE, f"`{item.name}` is neither of tokens alone, nor of tokens and experts or places")
        found[kind].append((item, letters))
    if len(found["e"]) != 1 or len(found["c"]) != 1 or len(found["s"]) > 1:
        raise Stop(CODE, f"`{op_name(node) or node.op}` where one-hot rows of experts and of places are multiplied")
    ((expert, one),), ((place, other),) = found["e"], found["c"]
    token, letters = found["s"][0] if found["s"] else (None, "s")
    if ("k" in one) != ("k" in other) or ("k" in letters and "k" not in one):
        raise Stop(CODE, "a sum over the choices of a token of which only some factors know")
    roots = _root(expert), _root(place)
    if "k" not in one:
        yield Term(expert, roots[0], place, roots[1], token)
        return
    for column in range(_number(shape(expert)[1])):
        yield Term(expert, roots[0], place, roots[1], token, column, "k" in letters)


def _number(size: Any) -> int:
    if not isinstance(size, int):
        raise Stop(CODE, "the number of choices of a token is a symbol")
    return size


def _straight(node: fx.Node, letters: str) -> tuple[fx.Node, str]:
    """Return a factor with its dimensions in the order s, k, e, c, where it is a permutation of one."""
    while letters != "".join(sorted(letters, key="skec".index)) and (turned := _turn(node)) is not None:
        node, letters = turned[0], _source_order(turned[1], letters)
    return node, letters


def _factors(node: fx.Node, order: str) -> list[tuple[fx.Node, str]]:
    """Return the factors of an outer product, each with the roles of its dimensions; a role k is summed over."""
    found = equation(node)
    if found is not None and len(found[1]) == len(order) == 3:
        names = dict(zip(found[1], order))
        summed = set("".join(found[0])) - set(names)
        if len(summed) == 1:
            names[summed.pop()] = "k"
        if all(set(item) <= set(names) for item in found[0]):
            return [(value, "".join(names[letter] for letter in item)) for value, item in zip(found[2], found[0])]
        return []
    if op_name(node) == "sum" and len(order) == 3 and len(node.args) == 2 and not node.kwargs:
        dims, inside = _dims(node.args[1:]), node.args[0]
        if len(dims) != 1 or not isinstance(inside, fx.Node) or len(shape(inside)) != 4:
            return []
        at = dims[0] % 4
        return _outer(inside, order[:at] + "k" + order[at:])
    return _outer(node, order)


def _outer(node: fx.Node, order: str) -> list[tuple[fx.Node, str]]:
    """Return the factors of a product by broadcasting, or of a batch of columns times rows."""
    name = op_name(node)
    both = node.args[:2]
    if name in ("bmm", "matmul") and len(order) == 3 and all(isinstance(arg, fx.Node) for arg in both):
        (left, first), (right, last) = (_without_ones(arg, order) for arg in both)  # type: ignore[arg-type]
        return [(left, first), (right, last)] if {len(first), len(last)} == {2} and first[0] == last[0] else []
    if name not in ("mul", "mul_") or node.kwargs or not all(isinstance(arg, fx.Node) for arg in both):
        return []
    made: list[tuple[fx.Node, str]] = []
    for arg in both:
        item, letters = _without_ones(arg, order)  # type: ignore[arg-type]
        made += _outer(item, letters) if letters == order and op_name(item) in ("mul", "mul_") else [(item, letters)]
    return made


def _without_ones(node: fx.Node, order: str) -> tuple[fx.Node, str]:
    """Return what a node adds dimensions of size 1 to, and the roles of the dimensions that it has."""
    if len(shape(node)) != len(order):
        raise Stop(CODE, f"`{node.name}` is broadcast against one-hot rows")
    while op_name(node) == "unsqueeze" and isinstance(node.args[0], fx.Node):
        at = int(node.args[1]) % len(shape(node))  # type: ignore[arg-type]
        node, order = node.args[0], order[:at] + order[at + 1 :]
    return node, order


def _root(node: fx.Node) -> fx.Node:
    """Return the numbers `[S]`, or `[S, k]`, outside which a factor `[..., n]` is 0: it is one-hot rows, times anything."""
    near, wanted = [node], shape(node)
    for _ in range(NEAR):
        if not near:
            break
        item = near.pop(0)
        name = op_name(item)
        if len(shape(item)) != len(wanted) or not all(map(same_size, shape(item), wanted)):
            continue
        found = equation(item)
        if name == "one_hot":
            return item.args[0]  # type: ignore[return-value]
        if name in (*COPIES, "type_as"):
            near.append(item.args[0])  # type: ignore[arg-type]
        elif name in ("mul", "mul_"):
            near += [arg for arg in item.args[:2] if isinstance(arg, fx.Node)]
        elif found is not None and all(set(letters) <= set(found[1]) for letters in found[0]):
            near += [value for value, letters in zip(found[2], found[0]) if letters == found[1]]
    raise Stop(CODE, f"`{node.name}` is not seen to be one-hot rows")
