"""Raise one-hot dispatch with capacity: the einsums that send tokens to places of experts and bring results back.

    combine = einsum("se,sc->sec", gate * one_hot(ids), one_hot(places))      [S, E, C], the sum of such terms for k choices
    y       = einsum("sec,sm->ecm", combine.bool(), x)                        becomes eff::moe_encode_v1
    out     = einsum("sec,ecm->sm", combine, experts(y))                      becomes eff::moe_decode_v1

A term is 0 outside one cell of each token, so its numbers are fetched there and [S, E, C] never exists. Where the cells of two
choices coincide they are added before they are compared with 0, as in the source. Router, drops and experts stay the source's.
Products are read in any spelling and layout (`expert_cells.py`). Gates are taken to be finite: 0 times infinity, which the source
would spread over all places, is not followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from effcompile.core.experts import MoESite
from effcompile.core.rewrite import Editor
from effcompile.core.site import Refusal
from effcompile.passes.recognize.aliases import Aliases
from effcompile.passes.recognize.expert_cells import CODE, NEAR, Cells, Contraction, brings, read_cells, sends
from effcompile.passes.recognize.expert_parts import Stop, shape
from effcompile.passes.recognize.expert_sites import Names
from effcompile.passes.recognize.match import same_size


@dataclass(frozen=True)
class Pair:
    """Hold the two products of one mixture, how each reads its [S, E, C], and what fills that."""

    encode: fx.Node
    there: Contraction
    decode: fx.Node
    back: Contraction
    sent: Cells
    fetched: Cells


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


def brings_back(node: fx.Node) -> bool:
    """Tell whether a node brings results back from places of experts, of a tensor that comes from one-hot rows."""
    return brings(node) is not None


def _pair(node: fx.Node, graph: fx.Graph) -> Pair:
    back = brings(node)
    assert back is not None
    stop = Stop(CODE, "results are brought back, and nothing like an einsum `sec,sm->ecm` sends the tokens")
    for sender in _senders(back.other):
        there = sends(sender)
        assert there is not None
        try:
            return _checked(
                Pair(sender, there, node, back, *(read_cells(p.cells, p.order) for p in (there, back))), graph
            )
        except Stop as failed:
            stop = failed
    raise stop


def _checked(pair: Pair, graph: fx.Graph) -> Pair:
    """Return a pair whose two halves fit each other, else raise Stop."""
    if not all(map(same_size, _sizes(pair.there), _sizes(pair.back))):
        raise Stop(CODE, "tokens are sent to other places than results come from")
    for node, operand, found in ((pair.encode, pair.there, pair.sent), (pair.decode, pair.back, pair.fetched)):
        value, kinds = node.meta["val"], {operand.other.meta["val"].dtype, node.meta["val"].dtype}
        if len(kinds) > 1 or not value.is_floating_point():
            raise Stop("EFF-M105", f"an einsum of {sorted(map(str, kinds))}")
        _unwritten(found, node, Aliases(graph))
    return pair


def _sizes(given: Contraction) -> tuple[Any, Any, Any]:
    """Return S, E and C."""
    found = dict(zip(given.order, shape(given.cells)))
    return found["s"], found["e"], found["c"]


def _senders(node: fx.Node) -> Iterator[fx.Node]:
    """Yield what sends tokens, going back from the experts' results, nearest first."""
    near, known = [node], {node}
    while near and len(known) < 4 * NEAR:
        for item in near:
            if sends(item) is not None:
                yield item
        near = [arg for item in near for arg in item.all_input_nodes if arg not in known]
        known.update(near)


def _unwritten(cells: Cells, reader: fx.Node, aliases: Aliases) -> None:
    """Check that nothing writes to what the terms read before the einsum does."""
    for term in cells.terms:
        for operand in (term.expert, term.ids, term.place, term.places, term.token):
            if (
                operand is not None
                and aliases.written_between(operand, aliases.order[operand], aliases.order[reader], set()) is not None
            ):
                raise Stop("EFF-M106", f"`{operand.name}` is written in place before the tokens are sent")


def _raise(pair: Pair, edit: Editor, names: Names) -> MoESite:
    encode, decode = pair.encode, pair.decode
    tokens, experts, capacity = _sizes(pair.there)
    x, y = pair.there.other, pair.back.other
    hidden = shape(x)[1]
    site = names.site(decode, "capacity")
    with edit.before(encode):
        ids, places, scale = _written(pair.sent, edit, encode.meta["val"].dtype)
        sizes = edit.size(experts), edit.size(capacity)
        there = edit.call(torch.ops.eff.moe_encode_v1.default, x, ids, places, scale, *sizes)
        there.meta["eff.site"] = site.id
        if pair.there.flat:
            there = edit.call(torch.ops.aten.flatten.using_ints, there, 0, 1, like=encode)
    with edit.before(decode):
        ids, places, weights = _written(pair.fetched, edit, decode.meta["val"].dtype)
        if pair.back.flat:
            y = edit.call(torch.ops.aten.view.default, y, [*sizes, edit.size(hidden)])
        back = edit.call(torch.ops.eff.moe_decode_v1.default, y, ids, places, weights, like=decode)
        back.meta["eff.site"] = site.id
    for old, new in ((encode, there), (decode, back)):
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


def _written(cells: Cells, edit: Editor, kind: torch.dtype) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Insert ids, places `[S, k]` and the numbers there, and return the three nodes."""
    terms = cells.terms
    of_choice = [term.column for term in terms]

    def column(value: Tensor, choice: int | None) -> Tensor:
        return value if choice is None else value[:, choice]

    def side_by_side(*given: Tensor) -> Tensor:
        return torch.stack([column(value, choice) for value, choice in zip(given, of_choice)], 1)

    ids = edit.inline(side_by_side, *(term.ids for term in terms))
    places = edit.inline(side_by_side, *(term.places for term in terms))
    operands = [node for term in terms for node in (term.expert, term.place, term.token) if node is not None]
    tokens = [(term.token is not None, term.column if term.by_choice else None) for term in terms]

    def numbers(ids: Tensor, places: Tensor, *given: Tensor) -> Tensor:
        left = iter(given)
        columns = []
        for number, (with_token, of_token) in enumerate(tokens):
            expert, place = (column(next(left), of_choice[number]) for _ in range(2))
            value = expert.gather(1, ids[:, number : number + 1])[:, 0]
            value = value * place.gather(1, places[:, number : number + 1])[:, 0]
            columns.append(column(next(left), of_token) * value if with_token else value)
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
