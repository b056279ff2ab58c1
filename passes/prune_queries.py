"""Run layers on the tokens that were chosen, where the graph runs them on all and masks: Mixture-of-Recursions, Mixture-of-Depths.

What is found is `where(chosen, f(x), x)`, `chosen` holding a fixed number of places of each sequence (a scatter of True at an
index, such as a top-k). Rows of f(x) that were not chosen are read by nobody, so f runs on the chosen rows of x: its operations are
made anew on fewer tokens (`recognize/token_axis.py` proves that each works token by token), rotations and the causal mask are
taken at the original positions, and the result is put back into x. An attention within f asks for the chosen tokens only. Where its
mask hides the others (recursions that keep keys of their own) keys are those of the chosen tokens too. Elsewhere they stay those of
all, which saves work where they come from outside f (keys that recursions share) and is refused where the next attention's keys
need every row.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from effcompile.core.plan import Plan
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, Pass, PassResult, copy_graph
from effcompile.core.site import Refusal
from effcompile.ops.tokens import rows
from effcompile.passes.recognize.elements import is_write, op_name
from effcompile.passes.recognize.token_axis import Axis, Follower, Place, Reads, rank
from effcompile.passes.tokens.remake import Cut, remade

aten = torch.ops.aten
_ROWS, _HEADS = Axis(Place(1), Place(0)), Axis(Place(2), Place(0))
_SDPA = "scaled_dot_product_attention"
_EMPTY = ("zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full")


@dataclass(frozen=True)
class PruneQueries(Pass):
    """Replace masked execution of layers by execution on the chosen tokens."""

    name: ClassVar[str] = "prune-queries"
    phase: ClassVar[str] = "captured"
    after: ClassVar[tuple[str, ...]] = ("remove-identities",)
    portable: ClassVar[bool] = True

    def run(self, program: Program, plan: Plan) -> PassResult:
        """Return the program with layers on chosen tokens, and a note for each place: how many tokens, or why all."""
        notes: list[str] = []
        changed = False
        for entry in program.entries:
            wheres = [node for node in entry.graph.graph.nodes if _chosen(node) is not None]
            if not wheres or any(is_write(node) for node in entry.graph.graph.nodes):
                continue
            edit = Editor(copy_graph(entry.graph))
            here = 0
            for node in [node for node in edit.graph.nodes if _chosen(node) is not None]:
                told = _prune(edit, node)
                here += not isinstance(told, Refusal)
                notes.append(str(told))
            if here:
                program, changed = program.with_graph(entry, edit.finish()), True
        return PassResult(program, changed, tuple(notes))


def _chosen(node: fx.Node) -> fx.Node | None:
    """Return the index `[B, k]` where a node keeps the other rows of a value `[B, S, C]` as they are, k being less than S."""
    if op_name(node) != "where" or not all(isinstance(arg, fx.Node) for arg in node.args) or rank(node) != 3:
        return None
    cond, mine, other = node.args
    if mine is other or len({tuple(map(str, n.meta["val"].shape)) for n in (node, mine, other)}) != 1:  # type: ignore[union-attr]
        return None
    column = cond.args[0] if op_name(cond) == "unsqueeze" and cond.args[1] in (-1, 2) else None  # type: ignore[arg-type, union-attr]
    if not isinstance(column, fx.Node) or op_name(column) != "scatter" or rank(column) != 2:
        return None
    base, dim, index, value = (*column.args, None)[:4]
    if dim not in (1, -1) or value is not True or not isinstance(index, fx.Node) or not _is_empty(base):
        return None
    shape, batch = node.meta["val"].shape, index.meta["val"].shape
    fixed = isinstance(shape[1], int) and isinstance(batch[1], int)
    return index if fixed and batch[1] < shape[1] and str(batch[0]) == str(shape[0]) else None


def _is_empty(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.meta["val"].dtype != torch.bool or op_name(node) not in _EMPTY:
        return False
    return "full" not in op_name(node) or node.args[-1] is False


def _is_distinct(index: fx.Node) -> bool:
    """Tell whether places are all different: those of a top-k, in any order. A key that stood twice would count twice."""
    node = index
    if node.target is operator.getitem and op_name(node.args[0]) == "sort" and node.args[1] == 0:  # type: ignore[arg-type]
        node = node.args[0].args[0]  # type: ignore[union-attr, assignment]
    return node.target is operator.getitem and op_name(node.args[0]) == "topk" and node.args[1] == 1  # type: ignore[arg-type]


def _hides(mask: Any, chosen: fx.Node) -> bool:
    """Tell whether a boolean mask `[..., K]` keeps no key that is not chosen; `chosen` `[B, K]` bool."""
    if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool:
        return False
    if op_name(mask) in ("bitwise_and", "logical_and", "__and__"):
        return any(_hides(arg, chosen) for arg in mask.args)
    node = mask
    while op_name(node) in ("unsqueeze", "expand"):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        last = op_name(node) == "unsqueeze" and int(node.args[1]) % rank(node) == rank(node) - 1  # type: ignore[arg-type]
        if last or str(node.meta["val"].shape[-1]) != str(source.meta["val"].shape[-1]):
            return False
        node = source
    shape = mask.meta["val"].shape
    return node is chosen and len(shape) == 4 and str(shape[0]) == str(chosen.meta["val"].shape[0])


@dataclass
class _Region:
    """Hold the axis of each value that derives from x, and the operands of a token's place beside it.

    `chosen` is the mask of the tokens that are chosen, where their places are known to be distinct; `own` are attentions whose
    masks hide all other keys.
    """

    x: fx.Node
    chosen: fx.Node | None
    axis: dict[fx.Node, Axis] = field(default_factory=dict)
    sides: dict[fx.Node, dict[fx.Node, Axis]] = field(default_factory=dict)
    own: set[fx.Node] = field(default_factory=set)

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the operands of a node of the region that are needed on the chosen tokens."""
        if op_name(node) == _SDPA:
            return list(node.args[: 3 if node in self.own else 1])  # type: ignore[arg-type]
        return [arg for arg in node.all_input_nodes if arg in self.axis]


def _followed(graph: fx.Graph, x: fx.Node, end: fx.Node, chosen: fx.Node | None) -> _Region:
    shape = x.meta["val"].shape
    region, rules = _Region(x, chosen, {x: _ROWS}), Follower(int(shape[1]), shape[0])
    begun = False
    for node in graph.nodes:
        if node is end:
            break
        begun = begun or node is x
        known = {arg: region.axis[arg] for arg in node.all_input_nodes if arg in region.axis}
        if not begun or node is x or not known:
            continue
        if op_name(node) == _SDPA:
            if region.axis.get(node.args[0]) == _HEADS and _is_plain(node):  # type: ignore[call-overload]
                region.axis[node] = _HEADS
                all_three = all(region.axis.get(arg) == _HEADS for arg in node.args[1:3])  # type: ignore[call-overload]
                if chosen is not None and all_three and _hides(_operand(node, 3, "attn_mask", None), chosen):
                    region.own.add(node)
            continue
        try:
            axis, sides = rules.follow(node, known)
        except Reads:
            continue  # its value is made of all tokens, as it was
        if axis is not None:
            region.axis[node] = axis
            region.sides[node] = sides
    return region


def _is_plain(node: fx.Node) -> bool:
    """Tell whether an attention has no dropout, and a mask that can be cut into rows."""
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    mask = _operand(node, 3, "attn_mask", None)
    return dropout == 0.0 and rank(node) == 4 and (mask is None or isinstance(mask, fx.Node))


def _operand(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _needed(region: _Region, result: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [result]
    while waiting:
        node = waiting.pop()
        if node not in found and node is not region.x:
            found.add(node)
            waiting.extend(region.operands(node))
    return found


def _prune(edit: Editor, where: fx.Node) -> Refusal | str:
    """Rewrite one place; return what was done, or why nothing was."""
    index = _chosen(where)
    assert index is not None
    _, result, x = where.args
    assert isinstance(result, fx.Node)
    assert isinstance(x, fx.Node)
    column = where.args[0].args[0]  # type: ignore[union-attr]
    region = _followed(edit.graph, x, where, column if _is_distinct(index) else None)  # type: ignore[arg-type]
    tokens, count = int(x.meta["val"].shape[1]), int(index.meta["val"].shape[1])
    at = str(where.meta.get("eff.source", "")) or where.name
    if result not in region.axis:
        return Refusal("EFF-R112", f"at {at}: what is chosen is not computed token by token")
    needed = _needed(region, result)
    if not any(op_name(node) in ("linear", "matmul", "mm", "addmm") for node in needed):
        return Refusal("EFF-R109", f"at {at}: nothing is saved")
    if (held := _held_whole(edit.graph, needed, where, region)) is not None:
        source = str(held.meta.get("eff.source", "")) or held.name
        return Refusal(
            "EFF-R113", f"at {at}: the attention at {source} is read for every token", "keys that recursions share"
        )
    with edit.before(where):
        made = _Pruned(edit, region, index, count).run(needed, result)
        edit.replace(where, edit.inline(rows.put_back, x, made, index))
    for node in [node for node in reversed(list(edit.graph.nodes)) if node in needed]:
        if not node.users:  # an attention without dropout too, which counts as random otherwise and would stay
            edit.graph.erase_node(node)
    return f"{count} of {tokens} tokens at {at}"


def _held_whole(graph: fx.Graph, needed: set[fx.Node], where: fx.Node, region: _Region) -> fx.Node | None:
    """Return an attention that has to run on all tokens all the same: keys of a later one, or another reader, derive from it."""
    whole: set[fx.Node] = set()
    sources: list[fx.Node]
    for node in reversed(list(graph.nodes)):
        if node in whole or (node not in needed and node is not where):
            sources = node.all_input_nodes
        elif node in needed and op_name(node) == _SDPA:
            sources = []  # keys may be the very node of the queries
            fx.node.map_arg((node.args[len(region.operands(node)) :], node.kwargs), sources.append)
        else:
            continue
        whole.update(arg for arg in sources if arg in needed)
    return next((node for node in needed if node in whole and op_name(node) == _SDPA), None)


class _Pruned:
    def __init__(self, edit: Editor, region: _Region, index: fx.Node, count: int) -> None:
        self.edit, self.region, self.index, self.count = edit, region, index, count
        self.made: dict[fx.Node, fx.Node] = {}
        self.taken: dict[tuple[fx.Node, Axis], fx.Node] = {}

    def run(self, needed: set[fx.Node], result: fx.Node) -> fx.Node:
        """Insert the operations of `needed` on the chosen tokens, in their order, and return the counterpart of the last one."""
        self.made[self.region.x] = self._take(self.region.x, _ROWS)
        for node in [node for node in self.edit.graph.nodes if node in needed]:
            self.made[node] = self._attention(node) if op_name(node) == _SDPA else self._remade(node)
        return self.made[result]

    def _take(self, value: fx.Node, axis: Axis) -> fx.Node:
        """Gather along the token axis; a value without a batch, or with one for all sequences, gets one."""
        if (value, axis) not in self.taken:
            node, missing = value, max(0, -axis.batch.dim)
            for _ in range(missing):
                node = self.edit.call(aten.unsqueeze.default, node, 0)
            token, batch = axis.tokens.dim + missing, axis.batch.dim + missing

            def along(x: Tensor, where: Tensor) -> Tensor:
                return rows.take_along(x, where, batch, token)

            self.taken[value, axis] = self.edit.inline(along, node, self.index)
        return self.taken[value, axis]

    def _remade(self, node: fx.Node) -> fx.Node:
        sides = self.region.sides[node]

        def moved(arg: fx.Node) -> fx.Node:
            return self.made[arg] if arg in self.region.axis else self._take(arg, sides[arg]) if arg in sides else arg

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), moved)
        cuts = Cut.of(self.region.axis[node], int(self.region.x.meta["val"].shape[1]), self.count)
        return remade(self.edit, node, args, kwargs, cuts)

    def _attention(self, node: fx.Node) -> fx.Node:
        edit, (q, k, v) = self.edit, node.args[:3]
        mask, causal = _operand(node, 3, "attn_mask", None), _operand(node, 5, "is_causal", False)
        if causal:
            mask = self._causal(k)  # type: ignore[arg-type]
        elif mask is not None:
            mask = self._rows_of(mask)
        if node in self.region.own:
            k, v = self.made[k], self.made[v]  # type: ignore[index]
            mask = self._take(mask, Axis(Place(3), Place(0)))
        rest = {name: node.kwargs[name] for name in ("scale", "enable_gqa") if name in node.kwargs}
        return edit.call(
            node.target,
            self.made[q],  # type: ignore[index]
            k,
            v,
            mask,
            0.0,
            False,
            like=node,
            **rest,
        )  # type: ignore[arg-type]

    def _causal(self, keys: fx.Node) -> fx.Node:
        length, device = keys.meta["val"].shape[2], keys.meta["val"].device
        key = self.edit.size(length)

        def earlier(index: Tensor, many: Any) -> Tensor:
            return torch.arange(many, device=device)[None, None, None, :] <= index[:, None, :, None]

        name = ("causal", self.index, str(length))
        return self.edit.shared(name, (self.index, key), lambda: self.edit.inline(earlier, self.index, key))

    def _rows_of(self, mask: fx.Node) -> fx.Node:
        shape = mask.meta["val"].shape
        if len(shape) < 2 or (isinstance(shape[-2], int) and shape[-2] == 1):
            return mask
        dim = len(shape) - 2
        return self._take(mask, Axis(Place(dim), Place(dim - 2)))
