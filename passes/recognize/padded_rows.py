"""Follow the rows of a padded batch through an encoder: from where they begin to where nobody reads a padded one any more.

The region starts at the activation that all attentions over one padding derive from. Every value in it is computed row by row, as
the rules of `token_axis.py` say, until it is multiplied by a mask that is 0 on padded rows, until only row 0 (a CLS head) is taken,
or until it is a key or value of a cross attention that hides the same rows. Anything else, a returned hidden state above all, is a
refusal by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.expr import BATCH, HEAD, KEY, Expr, axes_of, axis, const, walk
from effcompile.core.mask import key_padding_slot, substitute
from effcompile.core.rewrite import Editor
from effcompile.core.site import Refusal
from effcompile.passes.recognize.element_rules import rules
from effcompile.passes.recognize.elements import Reader, Unreadable, op_name
from effcompile.passes.recognize.sublayers import nearest_linears
from effcompile.passes.recognize.token_axis import POINTWISE, VIEWS, Axis, Follower, Place, Reads, rank

_ROWS, _HEADS = Axis(Place(1), Place(0)), Axis(Place(2), Place(0))


class RowsRefused(Exception):
    """Say why padded rows stay."""

    def __init__(self, code: str, reason: str, hint: str = "") -> None:
        self.refusal = Refusal(code, reason, hint)


@dataclass
class PaddedRegion:
    """Hold what is known while rows are followed through the graph.

    `batch` sequences of `length` rows; `kept` is the key-padding condition over the tensor `source`. `axis` says where rows and
    sequences lie in each value of the region, `exits` are the operations behind which nothing is row by row; `first_row`: row 0 is
    read even where it is padding.
    """

    edit: Editor
    batch: Any
    length: Any
    kept: Expr
    source: fx.Node
    axis: dict[fx.Node, Axis] = field(default_factory=dict)
    exits: list[fx.Node] = field(default_factory=list)
    first_row: bool = False


def attention_calls(graph: fx.Graph) -> list[AttentionCall]:
    """Return all attentions of a graph; raise `RowsRefused` where there is none."""
    found = [AttentionCall.of(n) for n in graph.nodes if n.target is torch.ops.eff.attention_v1.default]
    if not found:
        raise RowsRefused("EFF-A400", "no attention site")
    return found


def padded_calls(calls: Sequence[AttentionCall]) -> tuple[list[AttentionCall], Expr, fx.Node]:
    """Return the attentions whose mask is one key padding alone, that condition, and the tensor it reads; raise where none is."""
    first: RowsRefused | None = None
    groups: dict[tuple[Expr, fx.Node], list[AttentionCall]] = {}
    for call in calls:
        try:
            groups.setdefault(_padding_of(call), []).append(call)
        except RowsRefused as why:
            first = first or why
    if not groups:
        assert first is not None
        raise first
    (kept, source), mine = next(iter(groups.items()))
    return mine, kept, source


def _padding_of(call: AttentionCall) -> tuple[Expr, fx.Node]:
    """Return the key-padding condition that is the whole mask of a self-attention, and the tensor it reads."""
    site = str(call.node.meta.get("eff.site", "attention"))
    if call.keep is None or call.bias is not None or call.sinks is not None or call.softcap:
        raise RowsRefused("EFF-A402", f"`{site}` has more than key padding in its mask")
    slot = key_padding_slot(call.keep)
    if slot is None:
        raise RowsRefused("EFF-A402", f"the mask of `{site}` is not key padding alone")
    if call.empty_row == "nan":
        raise RowsRefused("EFF-A402", f"`{site}` turns a sequence without keys into NaN")
    if str(call.q.meta["val"].shape[2]) != str(call.k.meta["val"].shape[2]):
        raise RowsRefused("EFF-A402", f"`{site}` is cross attention")
    load = next(node for node in walk(call.keep) if node.op == "load")
    if BATCH not in axes_of(load):
        raise RowsRefused("EFF-A402", "one padding row serves the whole batch")
    return call.keep, call.loads[slot]


def _hides(call: AttentionCall, region: PaddedRegion) -> bool:
    """Tell whether an attention hides the keys that are padding in the region, whatever else it hides."""
    if call.keep is None:
        return False
    for part in call.keep.args if call.keep.op == "and" else (call.keep,):
        slot = key_padding_slot(part)
        if slot is not None and call.loads[slot] is region.source and _at(part, 0) == _at(region.kept, 0):
            return True
    return False


def _at(part: Expr, slot: int) -> Expr:
    """Return a condition on one load with that load in another slot."""
    load = next(node for node in walk(part) if node.op == "load")
    return substitute(part, load, Expr("load", load.args, slot, load.dtype))


def common_start(calls: Sequence[AttentionCall]) -> fx.Node:
    """Return the activation `[B, S, D]` that the first attention's queries, keys and values are projections of."""
    starts = {_rows_of(linear.args[0]) for linear in nearest_linears((calls[0].q, calls[0].k, calls[0].v))}  # type: ignore[arg-type]
    start = next(iter(starts)) if len(starts) == 1 else None
    if start is None:
        raise RowsRefused("EFF-A403", "query, key and value of the first layer are not projections of one activation")
    return start


def _rows_of(node: fx.Node) -> fx.Node | None:
    """Return what a view merges to rows `[B * S, D]`, or the activation itself."""
    while rank(node) != 3 and op_name(node) in VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return node if rank(node) == 3 else None


def plan_rows(region: PaddedRegion, start: fx.Node, calls: Sequence[AttentionCall]) -> list[fx.Node]:
    """Return every node computed from `start` up to the exits, in order; raise where a padded row may be read."""
    rules, axis = Follower(region.length, region.batch), region.axis
    axis[start] = _ROWS
    ordered: list[fx.Node] = []
    sites = {call.node for call in calls}
    for node in region.edit.graph.nodes:
        known = {arg: axis[arg] for arg in node.all_input_nodes if arg in axis}
        if node is start or not known:
            continue
        if node.op == "output":
            raise RowsRefused("EFF-A401", "padded rows are returned by the graph", "pool inside the compiled module")
        if node in sites:
            call = AttentionCall.of(node)
            if any(axis.get(x) != _HEADS for x in (call.q, call.k, call.v)):
                raise RowsRefused("EFF-A403", "a site reads keys from elsewhere")
            axis[node] = _HEADS
        elif node.target is torch.ops.eff.attention_v1.default:
            _check_reader(region, node)
            region.exits.append(node)
            continue
        elif _reads_first_row(region, node):
            region.first_row = True
            region.exits.append(node)
            continue
        elif _is_zeroed(region, node):
            region.exits.append(node)
            continue
        else:
            axis[node] = _followed(rules, node, known)
        ordered.append(node)
    if not sites <= axis.keys():
        raise RowsRefused("EFF-A403", "some sites do not derive from the first activation")
    if not region.exits:
        raise RowsRefused("EFF-A403", "nothing leaves the encoder")
    if region.first_row and any(call.empty_row == "uniform" for call in calls):
        raise RowsRefused("EFF-A402", "a CLS row of an all-padding sequence would average over padded values")
    return ordered


def _followed(rules: Follower, node: fx.Node, known: dict[fx.Node, Axis]) -> Axis:
    """Return the axis of a node that works row by row, and whose rows can stand in front; raise for any other."""
    try:
        axis, _ = rules.follow(node, known)
        if axis is None:
            raise Reads("it asks for a size")
        merged = axis.tokens.dim == axis.batch.dim
        if not (axis.tokens.alone and axis.batch.alone) and not (
            merged and axis.tokens.after == 1 == axis.batch.before
        ):
            raise Reads("it merges rows with something else")
        spreads = op_name(node) == "expand" or op_name(node) in POINTWISE
        if spreads and any(rank(arg) != rank(node) for arg in known):
            raise Reads("it repeats all rows")
    except Reads as why:
        source = str(node.meta.get("eff.source", ""))
        reason = f"`{op_name(node) or node.name}` {source} may read padded rows: {why}"
        raise RowsRefused("EFF-A401", reason, "pool with the mask") from None
    return axis


def _check_reader(region: PaddedRegion, node: fx.Node) -> None:
    """Raise unless an attention with another mask takes keys and values alone from the region, and hides those that are padding."""
    call, site = AttentionCall.of(node), str(node.meta.get("eff.site", "attention"))
    if any(arg in region.axis for arg in node.all_input_nodes if arg not in (call.k, call.v)):
        raise RowsRefused("EFF-A402", f"the mask of `{site}` differs from that of the sites before")
    if not _hides(call, region):
        raise RowsRefused("EFF-A401", f"`{site}` may read padded keys", "give it the mask of the encoder")
    if call.empty_row == "uniform":
        raise RowsRefused("EFF-A402", f"`{site}` averages over padded values where a sequence is all padding")


def _reads_first_row(region: PaddedRegion, node: fx.Node) -> bool:
    """Tell whether a node picks row 0 of each sequence."""
    if op_name(node) not in ("select", "slice") or node.args[0] not in region.axis or len(node.args) < 3:
        return False
    axis = region.axis[node.args[0]]  # type: ignore[index]
    if not axis.tokens.alone or int(node.args[1]) % rank(node.args[0]) != axis.tokens.dim:  # type: ignore[arg-type]
        return False
    return node.args[2] == 0 if op_name(node) == "select" else tuple(node.args[2:]) in ((0, 1), (0, 1, 1))


def _is_zeroed(region: PaddedRegion, node: fx.Node) -> bool:
    """Tell whether `node` multiplies a token activation by something that is 0 on every padded row."""
    if op_name(node) != "mul":
        return False
    inside = region.axis
    mine = [arg for arg in node.args if arg in inside]
    other = [arg for arg in node.args if isinstance(arg, fx.Node) and arg not in inside]
    if len(mine) != 1 or len(other) != 1 or inside[mine[0]] != _ROWS or rank(node) != 3:  # type: ignore[index]
        return False
    reader = Reader(region.edit.graph, rules())
    value = other[0].meta["val"]
    if value.dim() != 3:
        return False
    try:
        factor = reader.element(other[0], (axis(BATCH), axis(KEY), axis(HEAD)), reader.order[node])
    except Unreadable:
        return False
    load = next(node for node in walk(region.kept) if node.op == "load")
    for slot, tensor in enumerate(reader.loads):
        if tensor is region.source:
            zero = const(False) if load.dtype == torch.bool else const(0)
            result = substitute(factor, Expr("load", load.args, slot, load.dtype), zero)
            if result.is_const and result.value == 0:
                return True
    return False
