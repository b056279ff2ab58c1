"""Leave out tokens behind the last attention that nobody reads: a head that takes the class token, features without registers.

Behind the last attention of an encoder each token goes its own way (`recognize/token_axis.py`), and all that is read of them may be
some rows: `x[:, 0]`, `x[:, 5:]`. The last attention then asks for these tokens alone, with the keys of all, and what follows it
runs on them: projections, feed-forward and norms of the last layer. Register tokens of a vision transformer are left out of dense
features so. Exact: a row's value depends on no other row. Attention without a mask only; masks are met where they are proved,
which is later (`unpad.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from effcompile.core.plan import Plan
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, Pass, PassResult, copy_graph
from effcompile.passes.recognize.elements import is_write, op_name
from effcompile.passes.recognize.sublayers import nearest_linears
from effcompile.passes.recognize.token_axis import Axis, Follower, Place, Reads, rank
from effcompile.passes.tokens.remake import Cut, remade

aten = torch.ops.aten
_ROWS, _HEADS = Axis(Place(1), Place(0)), Axis(Place(2), Place(0))
_SDPA = "scaled_dot_product_attention"
Span = tuple[int, int]
"""First row, and the one behind the last."""


@dataclass(frozen=True)
class DropUnreadRows(Pass):
    """Run what follows the last attention on the tokens that are read."""

    name: ClassVar[str] = "drop-unread-rows"
    phase: ClassVar[str] = "captured"
    after: ClassVar[tuple[str, ...]] = ("remove-identities", "prune-queries")
    portable: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True
    apart_from: ClassVar[tuple[str, ...]] = ("tokens", "attention")  # both need a row for every key

    def run(self, program: Program, plan: Plan) -> PassResult:
        """Return the program with fewer rows behind attentions, and a note for each: how many of how many."""
        notes: list[str] = []
        for entry in program.entries:
            if any(is_write(node) for node in entry.graph.graph.nodes):
                continue
            if not any(_region(node) for node in entry.graph.graph.nodes if _is_plain(node)):
                continue
            edit = Editor(copy_graph(entry.graph))
            for node in [node for node in edit.graph.nodes if _is_plain(node)]:
                region = _region(node)
                if region is not None:
                    _Shorter(edit, region).run()
                    notes.append(f"{region.count} of {region.tokens} tokens behind {_told(node)}")
            program = program.with_graph(entry, edit.finish())
        return PassResult(program, bool(notes), tuple(notes))


def _told(node: fx.Node) -> str:
    return str(node.meta.get("eff.source", "")).rpartition("/site-packages/")[2] or node.name


@dataclass
class _Region:
    """Hold what follows an attention row by row, in order, up to the `picks`: operations that read some rows and no others."""

    attention: fx.Node
    tokens: int
    batch: Any
    axis: dict[fx.Node, Axis] = field(default_factory=dict)
    sides: dict[fx.Node, dict[fx.Node, Axis]] = field(default_factory=dict)
    picks: dict[fx.Node, Span] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()

    @property
    def count(self) -> int:
        """Return how many rows are read."""
        return sum(end - begin for begin, end in self.spans)

    def place(self, row: int) -> int:
        """Return where a row that is read stands among those that are."""
        return sum(min(end, row) - begin for begin, end in self.spans if begin < row)


def _is_plain(node: fx.Node) -> bool:
    """Tell whether a node is attention of every token to every token."""
    if op_name(node) != _SDPA or rank(node) != 4:
        return False
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:6], strict=False)) | node.kwargs
    tokens = node.meta["val"].shape[2]
    plain = given.get("attn_mask") is None and not given.get("is_causal") and given.get("dropout_p", 0.0) == 0.0
    return plain and isinstance(tokens, int) and tokens > 1


def _region(attention: fx.Node) -> _Region | None:
    """Return what follows an attention if all of it is read row by row, and some rows by nobody; else None."""
    shape = attention.meta["val"].shape
    region = _Region(attention, int(shape[2]), shape[0])
    rules, axis = Follower(region.tokens, region.batch), region.axis
    axis[attention] = _HEADS
    node = attention
    while node.op != "output":
        node = node.next
        known = {arg: axis[arg] for arg in node.all_input_nodes if arg in axis}
        if not known:
            continue
        span = _picked(node, axis, region.tokens)
        if span is not None:
            region.picks[node] = span
            continue
        try:
            place, beside = rules.follow(node, known)
        except Reads:
            return None
        if place is None:
            return None
        axis[node], region.sides[node] = place, beside
    region.spans = _joined(region.picks.values())
    return region if region.picks and region.count < region.tokens else None


def _picked(node: fx.Node, axis: dict[fx.Node, Axis], tokens: int) -> Span | None:
    """Return the rows that a node takes, where it takes a whole range of them."""
    name, source = op_name(node), node.args[0] if node.args else None
    if name not in ("select", "slice") or source not in axis or len(node.args) < 3:
        return None
    place = axis[source]  # type: ignore[index]
    dim, first = node.args[1:3]
    if not place.tokens.alone or not isinstance(dim, int) or dim % rank(source) != place.tokens.dim:  # type: ignore[arg-type]
        return None
    if name == "select":
        return (first % tokens, first % tokens + 1) if isinstance(first, int) else None
    last = node.args[3] if len(node.args) > 3 else tokens
    step = node.args[4] if len(node.args) > 4 else 1
    if step != 1 or not isinstance(last, int) or not isinstance(first, int | None):
        return None
    begin, end, _ = slice(first, last).indices(tokens)
    return (begin, end) if begin < end else None


def _joined(spans: Any) -> tuple[Span, ...]:
    """Return ranges in order, those that meet as one."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return tuple(found)


class _Shorter:
    def __init__(self, edit: Editor, region: _Region) -> None:
        self.edit, self.region = edit, region
        self.made: dict[fx.Node, fx.Node] = {}
        self.taken: dict[tuple[fx.Node, int], fx.Node] = {}

    def run(self) -> None:
        """Insert every operation of the region on the rows that are read, in front of the original."""
        region, edit = self.region, self.edit
        for node in list(edit.graph.nodes):
            if node in region.axis:
                with edit.before(node):
                    self.made[node] = self._attention(node) if node is region.attention else self._remade(node)
            elif node in region.picks:
                with edit.before(node):
                    edit.replace(node, self._pick(node, region.picks[node]))
        for node in reversed(list(region.axis)):  # an attention counts as random, and would stay
            if not node.users:
                edit.graph.erase_node(node)

    def _attention(self, node: fx.Node) -> fx.Node:
        q = self._queries(node.args[0])  # type: ignore[arg-type]
        return self.edit.call(node.target, q, *node.args[1:], like=node, **node.kwargs)  # type: ignore[arg-type]

    def _queries(self, q: fx.Node) -> fx.Node:
        """Insert the queries of the rows that are read: projected anew from these rows, unless they share a product with keys."""
        linears = nearest_linears([q])
        chain = _chain(q, next(iter(linears)), self.region) if len(linears) == 1 else None
        if chain is None:
            return self._take(q, 2)
        rules = Follower(self.region.tokens, self.region.batch)
        source = chain[0].args[0]
        axis, made = {source: _ROWS}, {source: self._take(source, 1)}  # type: ignore[arg-type, dict-item]
        for node in chain:
            axis[node], sides = rules.follow(node, {a: axis[a] for a in node.all_input_nodes if a in axis})  # type: ignore[assignment]
            made[node] = self._shorter(node, axis[node], sides, made)
        return made[q]

    def _shorter(self, node: fx.Node, axis: Axis, sides: dict[fx.Node, Axis], made: dict[Any, fx.Node]) -> fx.Node:
        def moved(arg: fx.Node) -> fx.Node:
            return made[arg] if arg in made else self._take(arg, sides[arg].tokens.dim) if arg in sides else arg

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), moved)
        return remade(self.edit, node, args, kwargs, Cut.of(axis, self.region.tokens, self.region.count))

    def _remade(self, node: fx.Node) -> fx.Node:
        return self._shorter(node, self.region.axis[node], self.region.sides[node], self.made)

    def _pick(self, node: fx.Node, span: Span) -> fx.Node:
        source, begin = self.made[node.args[0]], self.region.place(span[0])  # type: ignore[index]
        if op_name(node) == "select":
            return self.edit.call(node.target, source, node.args[1], begin, like=node)  # type: ignore[arg-type]
        end = begin + span[1] - span[0]
        return self.edit.call(node.target, source, node.args[1], begin, end, like=node)  # type: ignore[arg-type]

    def _take(self, value: fx.Node, dim: int) -> fx.Node:
        """Insert the rows of a value that are read."""
        if (value, dim) not in self.taken:
            parts = [self.edit.call(aten.slice.Tensor, value, dim, *span) for span in self.region.spans]
            self.taken[value, dim] = parts[0] if len(parts) == 1 else self.edit.call(aten.cat.default, parts, dim)
        return self.taken[value, dim]


def _chain(q: fx.Node, linear: fx.Node, region: _Region) -> Sequence[fx.Node] | None:
    """Return the operations from a projection to queries that nothing else reads, in order; None where there are others."""
    found, waiting = {q}, [q]
    while waiting:
        node = waiting.pop()
        if node is not linear:
            for arg in node.all_input_nodes:
                if arg not in found and linear in nearest_linears([arg]):
                    found.add(arg)
                    waiting.append(arg)
    source = linear.args[0]
    if (
        not isinstance(source, fx.Node)
        or rank(source) != 3
        or any(user is not region.attention and user not in found for node in found for user in node.users)
    ):
        return None
    chain = [node for node in q.graph.nodes if node in found]
    rules, axis = Follower(region.tokens, region.batch), {source: _ROWS}
    for node in chain:
        try:
            place, _ = rules.follow(node, {a: axis[a] for a in node.all_input_nodes if a in axis})
        except Reads:
            return None
        if place is None:
            return None
        axis[node] = place
    return chain if axis[q] == _HEADS else None
