"""Raise one-hot dispatch with capacity: the einsums that send tokens to places of experts and bring results back.

    combine = einsum("se,sc->sec", gate * one_hot(ids), one_hot(places))      [S, E, C], the sum of such terms for k choices
    y       = einsum("sec,sm->ecm", combine.bool(), x)                        becomes eff::moe_encode_v1
    out     = einsum("sec,ecm->sm", combine, experts(y))                      becomes eff::moe_decode_v1

A term is 0 outside one cell of each token, so its numbers are fetched there and [S, E, C] never exists. Where the cells of two
choices coincide they are added before they are compared with 0, as in the source. Router, drops and experts stay the source's.
Gates are taken to be finite: 0 times infinity, which the source would spread over all places, is not followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, fx

from effcompile.core.experts import MoESite
from effcompile.core.rewrite import Editor
from effcompile.core.site import Refusal
from effcompile.passes.recognize.aliases import Aliases
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.expert_parts import COPIES, Stop, shape
from effcompile.passes.recognize.expert_sites import Names
from effcompile.passes.recognize.match import same_size

CODE = "EFF-M107"
_TESTS = ("ne", "gt")
_NEAR = 64  # nodes that are looked at for one-hot rows
Step: TypeAlias = torch.dtype | str


@dataclass(frozen=True)
class _Term:
    """Hold one choice: a factor `[S, E]` that is 0 outside `ids`, one `[S, C]` that is 0 outside `places`, maybe one `[S]`."""

    expert: fx.Node
    ids: fx.Node
    place: fx.Node
    places: fx.Node
    token: fx.Node | None


@dataclass(frozen=True)
class _Cells:
    """Hold what fills `[S, E, C]`: terms, and what is done to their sum in turn: casts and comparisons with 0, which keep 0."""

    terms: tuple[_Term, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Pair:
    """Hold the two einsums of one mixture, and how each fills its [S, E, C]."""

    encode: fx.Node
    decode: fx.Node
    sent: _Cells
    fetched: _Cells


def raise_capacity(edit: Editor, names: Names, training: bool) -> tuple[list[MoESite], dict[fx.Node, Refusal]]:
    """Raise all pairs of a graph; return their sites, and why others stay, by the einsum that brings results back."""
    sites: list[MoESite] = []
    reasons: dict[fx.Node, Refusal] = {}
    for node in list(edit.graph.nodes):
        if not brings_back(node):
            continue
        try:
            pair = _pair(node, edit.graph)
        except Stop as stop:
            reasons[node] = stop.refusal
            continue
        if training:
            reasons[node] = Refusal(
                "EFF-A301", "no gradient flows through the raised op", "run inference under torch.no_grad()"
            )
            continue
        sites.append(_raise(pair, edit, names))
    return sites, reasons


def _equation(node: fx.Node) -> tuple[tuple[str, ...], str, tuple[fx.Node, ...]] | None:
    """Return the letters of an einsum's operands and result, and the operands."""
    if op_name(node) != "einsum":
        return None
    given, arrow, result = str(node.args[0]).replace(" ", "").partition("->")
    letters = tuple(given.split(","))
    plain = arrow and all(item.isalpha() and len(set(item)) == len(item) for item in (*letters, result))
    return (letters, result, tuple(node.args[1])) if plain else None  # type: ignore[arg-type]


def brings_back(node: fx.Node) -> bool:
    """Tell whether a node is `sec,ecm->sm`, of a tensor that comes from one-hot rows."""
    found = _split(node, 2)
    return found is not None and _from_one_hot(found[0])


def _split(node: fx.Node, rank: int) -> tuple[fx.Node, fx.Node] | None:
    """Return ([S, E, C], the other operand) of `sec,ecm->sm` (rank 2) or `sec,sm->ecm` (rank 3), in any letters and order."""
    found = _equation(node)
    if found is None or len(found[0]) != 2 or len(found[1]) != rank:
        return None
    letters, result, operands = found
    for (cells, other), (first, second) in ((letters, operands), (letters[::-1], operands[::-1])):
        if len(cells) != 3:
            continue
        s, e, c = cells[0], cells[1], cells[2]
        wanted = (f"{e}{c}{result[-1]}", f"{s}{result[-1]}")
        if result[-1] not in cells and (other, result) == (wanted if rank == 2 else wanted[::-1]):
            return first, second
    return None


def _from_one_hot(node: fx.Node) -> bool:
    near, known = [node], {node}
    while near and len(known) < _NEAR:
        near = [arg for item in near for arg in item.all_input_nodes if arg not in known]
        known.update(near)
        if any(op_name(item) == "one_hot" for item in near):
            return True
    return False


def _pair(decode: fx.Node, graph: fx.Graph) -> Pair:
    back = _split(decode, 2)
    assert back is not None
    cells, results = back
    encode = next(_senders(results), None)
    if encode is None:
        raise Stop(CODE, "results are brought back, and no einsum `sec,sm->ecm` sends the tokens")
    there = _split(encode, 3)
    assert there is not None
    pair = Pair(encode, decode, _cells(there[0]), _cells(cells))
    if not all(map(same_size, shape(there[0]), shape(cells))):
        raise Stop(CODE, "tokens are sent to other places than results come from")
    for node, operand, found in ((encode, there[1], pair.sent), (decode, results, pair.fetched)):
        value, kinds = node.meta["val"], {operand.meta["val"].dtype, node.meta["val"].dtype}
        if len(kinds) > 1 or not value.is_floating_point():
            raise Stop("EFF-M105", f"an einsum of {sorted(map(str, kinds))}")
        _unwritten(found, node, Aliases(graph))
    return pair


def _senders(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the einsums that send tokens, going back from the experts' results, nearest first."""
    near, known = [node], {node}
    while near and len(known) < 4 * _NEAR:
        for item in near:
            found = _split(item, 3)
            if found is not None and _from_one_hot(found[0]):
                yield item
        near = [arg for item in near for arg in item.all_input_nodes if arg not in known]
        known.update(near)


def _unwritten(cells: _Cells, reader: fx.Node, aliases: Aliases) -> None:
    """Check that nothing writes to what the terms read before the einsum does."""
    for term in cells.terms:
        for operand in (term.expert, term.ids, term.place, term.places, term.token):
            if (
                operand is not None
                and aliases.written_between(operand, aliases.order[operand], aliases.order[reader], set()) is not None
            ):
                raise Stop("EFF-M106", f"`{operand.name}` is written in place before the tokens are sent")


def _cells(node: fx.Node) -> _Cells:
    """Read what fills `[S, E, C]`, back from the einsum that reads it."""
    steps: list[Step] = []
    while isinstance(node.args[0], fx.Node):
        name = op_name(node)
        if name in _TESTS and node.args[1:] == (0,):
            steps.append(name)
        elif name in (*COPIES, "type_as"):
            if node.meta["val"].dtype != node.args[0].meta["val"].dtype:
                steps.append(node.meta["val"].dtype)
        else:
            break
        node = node.args[0]
    return _Cells(tuple(_terms(node)), tuple(reversed(steps)))


def _terms(node: fx.Node) -> Iterator[_Term]:
    if op_name(node) in ("add", "add_") and not node.kwargs and all(isinstance(arg, fx.Node) for arg in node.args[:2]):
        for arg in node.args[:2]:
            yield from _terms(arg)  # type: ignore[arg-type]
        return
    factors = _factors(node)
    tokens = [item for item, letters in factors if letters == "s"]
    experts = [item for item, letters in factors if letters == "se"]
    places = [item for item, letters in factors if letters == "sc"]
    if len(experts) != 1 or len(places) != 1 or len(tokens) > 1:
        raise Stop(CODE, f"`{op_name(node) or node.op}` where one-hot rows of experts and of places are multiplied")
    yield _Term(experts[0], _root(experts[0]), places[0], _root(places[0]), tokens[0] if tokens else None)


def _factors(node: fx.Node) -> list[tuple[fx.Node, str]]:
    """Return the factors of an outer product `[S, E, C]`, each with the dimensions that it has: `s`, `se` or `sc`."""
    found = _equation(node)
    if found is not None and len(found[1]) == 3:
        names = dict(zip(found[1], "sec"))
        if all(set(item) <= set(names) for item in found[0]):
            return [(value, "".join(names[letter] for letter in item)) for value, item in zip(found[2], found[0])]
    if op_name(node) in ("mul", "bmm") and all(isinstance(arg, fx.Node) for arg in node.args[:2]):
        made = []
        for arg in node.args[:2]:
            assert isinstance(arg, fx.Node)
            at = arg.args[1] if op_name(arg) == "unsqueeze" else None
            if at not in (1, -2, 2, -1) or len(shape(arg)) != 3:
                return []
            made.append((arg.args[0], "sc" if at in (1, -2) else "se"))
        return made  # type: ignore[return-value]
    return []


def _root(node: fx.Node) -> fx.Node:
    """Return the numbers `[S]` outside which a factor `[S, n]` is 0: it is one-hot rows, times anything."""
    near = [node]
    for _ in range(_NEAR):
        if not near:
            break
        item = near.pop(0)
        name = op_name(item)
        if name == "one_hot":
            ids = item.args[0]
            if len(shape(ids)) == 1 and len(shape(item)) == 2 and same_size(shape(item)[1], shape(node)[1]):  # type: ignore[arg-type]
                return ids  # type: ignore[return-value]
        found = _equation(item)
        if name in (*COPIES, "type_as"):
            near.append(item.args[0])  # type: ignore[arg-type]
        elif name in ("mul", "mul_"):
            near += [arg for arg in item.args[:2] if isinstance(arg, fx.Node) and len(shape(arg)) == 2]
        elif found is not None and len(found[1]) == 2 and all(set(letters) <= set(found[1]) for letters in found[0]):
            near += [value for value, letters in zip(found[2], found[0]) if letters == found[1]]
    raise Stop(CODE, f"`{node.name}` is not seen to be one-hot rows")


def _raise(pair: Pair, edit: Editor, names: Names) -> MoESite:
    encode, decode = pair.encode, pair.decode
    sent, fetched = _split(encode, 3), _split(decode, 2)
    assert sent is not None
    assert fetched is not None
    x, y = sent[1], fetched[1]
    tokens, experts, capacity = shape(sent[0])
    hidden = shape(x)[1]
    site = names.site(decode, "capacity")
    with edit.before(encode):
        ids, places, scale = _written(pair.sent, edit, encode.meta["val"].dtype)
        sizes = edit.size(experts), edit.size(capacity)
        there = edit.call(torch.ops.eff.moe_encode_v1.default, x, ids, places, scale, *sizes, like=encode)
    with edit.before(decode):
        ids, places, weights = _written(pair.fetched, edit, decode.meta["val"].dtype)
        back = edit.call(torch.ops.eff.moe_decode_v1.default, y, ids, places, weights, like=decode)
    for old, new in ((encode, there), (decode, back)):
        new.meta["eff.site"] = site.id
        edit.replace(old, new)
    return MoESite(
        site.id,
        "moe",
        site.entry,
        site.source,
        "capacity",
        tokens=tokens if isinstance(tokens, int) else str(tokens),
        top_k=len(pair.fetched.terms),
        experts=int(experts),
        hidden=int(hidden),
        inner=0,
        capacity=capacity if isinstance(capacity, int) else str(capacity),
        dtype=str(decode.meta["val"].dtype).removeprefix("torch."),
    )


def _written(cells: _Cells, edit: Editor, kind: torch.dtype) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Insert ids, places `[S, k]` and the numbers there, and return the three nodes."""
    ids = edit.inline(lambda *given: torch.stack(given, 1), *(term.ids for term in cells.terms))
    places = edit.inline(lambda *given: torch.stack(given, 1), *(term.places for term in cells.terms))
    operands = [node for term in cells.terms for node in (term.expert, term.place, term.token) if node is not None]
    tokens = [term.token is not None for term in cells.terms]

    def numbers(ids: Tensor, places: Tensor, *given: Tensor) -> Tensor:
        left = iter(given)
        columns = []
        for number, with_token in enumerate(tokens):
            expert = next(left).gather(1, ids[:, number : number + 1])[:, 0]
            value = expert * next(left).gather(1, places[:, number : number + 1])[:, 0]
            columns.append(next(left) * value if with_token else value)
        value = torch.stack(columns, 1)
        if len(columns) > 1:
            # Of choices in one cell the first has the sum, the others nothing: so does the tensor that they fill.
            same = (ids[:, :, None] == ids[:, None]) & (places[:, :, None] == places[:, None])
            earlier = torch.ones(len(columns), len(columns), dtype=torch.bool, device=ids.device).tril(-1)
            value = torch.where(same, value[:, None], 0).sum(2)
            value = torch.where((same & earlier).any(2), 0, value)
        for step in (*cells.steps, kind):
            if isinstance(step, torch.dtype):
                value = value.to(step)
            else:
                value = value != 0 if step == "ne" else value > 0
        return value

    return ids, places, edit.inline(numbers, ids, places, *operands)
