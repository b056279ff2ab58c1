"""Follow the rows of a padded batch through an encoder: from where they begin to where nobody reads a padded one any more.

The region starts at the activation that all attentions over one padding derive from. Every value in it is computed row by row,
until it is multiplied by a mask that is 0 on padded rows, until only row 0 (a CLS head) is taken, or until it is a key or value of
a cross attention that hides the same rows. Anything else, a returned hidden state above all, is a refusal by name.
"""

from __future__ import annotations

import operator
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

_ARITHMETIC = ("add", "sub", "mul", "div", "pow", "sqrt", "rsqrt", "neg", "abs", "exp", "clamp", "to", "erf", "square")
_ACTIVATIONS = ("tanh", "sigmoid", "relu", "gelu", "silu", "elu", "leaky_relu", "hardtanh", "mish")
POINTWISE = frozenset((*_ARITHMETIC, *_ACTIVATIONS))
_LAST_DIM = frozenset(("linear", "layer_norm", "rms_norm", "softmax", "mean", "sum", "var"))
SHAPES = ("view", "reshape", "_unsafe_view", "contiguous", "clone")


class RowsRefused(Exception):
    """Say why padded rows stay."""

    def __init__(self, code: str, reason: str, hint: str = "") -> None:
        self.refusal = Refusal(code, reason, hint)


@dataclass
class PaddedRegion:
    """Hold what is known while rows are followed through the graph.

    `batch` sequences of `length` rows; `kept` is the key-padding condition over the tensor `source`. `exits` are the operations
    behind which nothing is row by row, `heads` values `[B, H, S, D]`; `first_row`: row 0 is read even where it is padding.
    """

    edit: Editor
    batch: Any
    length: Any
    kept: Expr
    source: fx.Node
    heads: set[fx.Node] = field(default_factory=set)
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


def _upstream(node: fx.Node) -> fx.Node | None:
    """Return the token activation `[B, S, D]` that a query, key or value is projected from."""
    while op_name(node) in ("transpose", "permute", *SHAPES, "linear", "add", "mul") and isinstance(
        node.args[0], fx.Node
    ):
        done = op_name(node) == "linear"
        node = node.args[0]
        if done:
            return node
    return None


def common_start(calls: Sequence[AttentionCall]) -> fx.Node:
    """Return the activation that the first attention's queries, keys and values are projections of."""
    starts = {_upstream(x) for x in (calls[0].q, calls[0].k, calls[0].v)}
    if len(starts) != 1 or None in starts:
        raise RowsRefused("EFF-A403", "query, key and value of the first layer are not projections of one activation")
    start = next(iter(starts))
    assert start is not None
    return start


def plan_rows(region: PaddedRegion, start: fx.Node, calls: Sequence[AttentionCall]) -> list[fx.Node]:
    """Return every node computed from `start` up to the exits, in order; raise where a padded row may be read."""
    inside: set[fx.Node] = {start}
    ordered: list[fx.Node] = []
    sites = {call.node for call in calls}
    for node in region.edit.graph.nodes:
        if node is start or not any(arg in inside for arg in node.all_input_nodes):
            continue
        if node.op == "output":
            raise RowsRefused("EFF-A401", "padded rows are returned by the graph", "pool inside the compiled module")
        if node in sites:
            call = AttentionCall.of(node)
            if not all(x in inside for x in (call.q, call.k, call.v)):
                raise RowsRefused("EFF-A403", "a site reads keys from elsewhere")
            region.heads.add(node)
        elif node.target is torch.ops.eff.attention_v1.default:
            _check_reader(region, node, inside)
            region.exits.append(node)
            continue
        elif _reads_first_row(node):
            region.first_row = True
            region.exits.append(node)
            continue
        elif _is_zeroed(region, node, inside):
            region.exits.append(node)
            continue
        elif not _row_by_row(region, node, inside):
            source = str(node.meta.get("eff.source", ""))
            raise RowsRefused(
                "EFF-A401", f"`{op_name(node) or node.name}` {source} may read padded rows", "pool with the mask"
            )
        elif _is_heads(region, node):
            region.heads.add(node)
        inside.add(node)
        ordered.append(node)
    if not sites <= inside:
        raise RowsRefused("EFF-A403", "some sites do not derive from the first activation")
    if not region.exits:
        raise RowsRefused("EFF-A403", "nothing leaves the encoder")
    if region.first_row and any(call.empty_row == "uniform" for call in calls):
        raise RowsRefused("EFF-A402", "a CLS row of an all-padding sequence would average over padded values")
    return ordered


def _check_reader(region: PaddedRegion, node: fx.Node, inside: set[fx.Node]) -> None:
    """Raise unless an attention with another mask takes keys and values alone from the region, and hides those that are padding."""
    call, site = AttentionCall.of(node), str(node.meta.get("eff.site", "attention"))
    if any(arg in inside for arg in node.all_input_nodes if arg not in (call.k, call.v)):
        raise RowsRefused("EFF-A402", f"the mask of `{site}` differs from that of the sites before")
    if not _hides(call, region):
        raise RowsRefused("EFF-A401", f"`{site}` may read padded keys", "give it the mask of the encoder")
    if call.empty_row == "uniform":
        raise RowsRefused("EFF-A402", f"`{site}` averages over padded values where a sequence is all padding")


def _is_heads(region: PaddedRegion, node: fx.Node) -> bool:
    """Tell whether a row-by-row node holds heads in front of rows, `[B, H, S, D]`."""
    before = any(arg in region.heads for arg in node.all_input_nodes)
    return before != (op_name(node) in ("transpose", "permute"))


def _reads_first_row(node: fx.Node) -> bool:
    return op_name(node) == "select" and node.args[1] == 1 and node.args[2] == 0


def _is_zeroed(region: PaddedRegion, node: fx.Node, inside: set[fx.Node]) -> bool:
    """Tell whether `node` multiplies a token activation by something that is 0 on every padded row."""
    if op_name(node) != "mul":
        return False
    mine = [arg for arg in node.args if arg in inside]
    other = [arg for arg in node.args if isinstance(arg, fx.Node) and arg not in inside]
    if len(mine) != 1 or len(other) != 1:
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


def _tokens(region: PaddedRegion, node: fx.Node) -> bool:
    value = node.meta.get("val")
    return (
        isinstance(value, torch.Tensor)
        and value.dim() >= 3
        and str(value.shape[0]) == str(region.batch)
        and str(value.shape[1]) == str(region.length)
    )


def _row_by_row(region: PaddedRegion, node: fx.Node, inside: set[fx.Node]) -> bool:
    """Tell whether each row of the result depends on the same row of the operands alone."""
    name = op_name(node)
    if node.target is operator.getitem:
        return True
    if name in ("transpose", "permute"):
        return _to_heads(node) or _from_heads(node)
    if not _tokens(region, node) and name not in ("split", "chunk", "unbind"):
        return name in SHAPES and name in ("contiguous", "clone")
    if name in POINTWISE:
        operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
        return all(arg in inside or _fits_rows(region, arg, node) for arg in operands)
    if name == "layer_norm":
        return len(node.args[1]) <= node.meta["val"].dim() - 2  # type: ignore[arg-type]
    if name in _LAST_DIM:
        return _last_dim_only(node, name)
    if name in SHAPES:
        source = node.args[0]
        return isinstance(source, fx.Node) and _tokens(region, source)
    if name == "split":
        source = node.args[0]
        assert isinstance(source, fx.Node)
        dim = node.args[2] if len(node.args) > 2 else 0
        return isinstance(dim, int) and dim % source.meta["val"].dim() >= 2
    return False


def _last_dim_only(node: fx.Node, name: str) -> bool:
    if name in ("linear", "rms_norm"):
        return True
    dims = node.args[1] if len(node.args) > 1 else None
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    listed = [dims] if isinstance(dims, int) else dims
    keep = name == "softmax" or (len(node.args) > 2 and node.args[2] is True)
    return isinstance(listed, list | tuple) and keep and all(int(d) % rank == rank - 1 for d in listed)  # type: ignore[call-overload]


def _to_heads(node: fx.Node) -> bool:
    """[B, S, H, D] -> [B, H, S, D]"""
    return node.meta["val"].dim() == 4 and (_dims(node) == [0, 2, 1, 3])


_from_heads = _to_heads


def _dims(node: fx.Node) -> list[int]:
    rank = node.meta["val"].dim()
    if op_name(node) == "permute":
        return [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    order = list(range(rank))
    a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return order


def _fits_rows(region: PaddedRegion, arg: fx.Node, node: fx.Node) -> bool:
    """Tell whether an operand from outside is the same for every row, or can be packed with the rows."""
    value = arg.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return True
    return value.dim() <= node.meta["val"].dim() - 2 or value.dim() == node.meta["val"].dim()
