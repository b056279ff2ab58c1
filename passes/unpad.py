"""Drop padded rows before an encoder's layers and restore them after, where the graph itself proves that nobody reads them.

An encoder computes every padded position and then ignores it: attention masks it as a key, and the pooling multiplies it by zero.
Both facts are visible in the graph (`recognize/padded_rows.py`). A decoder that attends to the encoder under the same padding does
not read padded rows either: the encoder runs without them, and so do the projections to the decoder's keys and values.

Exact for finite activations: a padded row enters the result as `0 * x`. Padded rows that overflow to infinity would give NaN in the
source and 0 here.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from effcompile.core import compat
from effcompile.core.attention_call import AttentionCall
from effcompile.core.expr import walk
from effcompile.core.plan import Plan
from effcompile.core.program import Entry, Program
from effcompile.core.rewrite import Editor, Pass, PassResult, copy_graph, fake_mode_of
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.padded_rows import (
    PaddedRegion,
    RowsRefused,
    attention_calls,
    common_start,
    padded_calls,
    plan_rows,
)
from effcompile.passes.recognize.token_axis import ALONG, POINTWISE, REDUCTIONS, VIEWS, Axis, rank


@dataclass(frozen=True)
class Unpad(Pass):
    """Pack padded batches of encoders (CPU; the packed attention runs sequence by sequence)."""

    name: ClassVar[str] = "unpad"
    phase: ClassVar[str] = "raised"

    def run(self, program: Program, plan: Plan) -> PassResult:
        """Return the program with padded rows dropped inside its encoder, or a note that says why not."""
        notes: list[str] = []
        changed = False
        for entry in program.entries:
            if program.device != "cpu":
                continue
            try:
                graph, count = _unpad(entry)
            except RowsRefused as stop:
                notes.append(str(stop.refusal))
                continue
            program, changed = program.with_graph(entry, graph), True
            notes.append(f"padded rows dropped around {count} attention sites")
        return PassResult(program, changed, tuple(notes))


def _unpad(entry: Entry) -> tuple[fx.GraphModule, int]:
    padded_calls(attention_calls(entry.graph.graph))  # most graphs are refused here, before anything is copied
    edit = Editor(copy_graph(entry.graph))
    calls, kept, source = padded_calls(attention_calls(edit.graph))
    shape = calls[0].q.meta["val"].shape
    region = PaddedRegion(edit, shape[0], shape[2], kept, source)
    start = common_start(calls)
    ordered = plan_rows(region, start, calls)
    _rewrite(region, start, ordered)
    return edit.finish(), len(calls)


def _rewrite(region: PaddedRegion, start: fx.Node, ordered: Sequence[fx.Node]) -> None:
    edit, aten = region.edit, torch.ops.aten
    mode = fake_mode_of(edit.graph)
    assert mode is not None
    compat.allow_data_dependent_sizes(mode)
    first = ordered[0]
    with edit.before(first):
        kept = region.source
        load = next(node for node in walk(region.kept) if node.op == "load")
        for place in reversed(range(len(load.args))):
            if load.args[place].is_const:
                kept = edit.call(aten.select.int, kept, place, int(load.args[place].value or 0))
        if kept.meta["val"].dtype != torch.bool:
            kept = edit.call(aten.ne.Scalar, kept, 0)
        triple = edit.call(torch.ops.eff.pack_rows_v1.default, kept, region.first_row)
        index, is_key, lengths = (edit.call(operator.getitem, triple, n) for n in range(3))
        packed = {start: _pack(region, start, region.axis[start], rank(start), index)}
    for node in ordered:
        with edit.before(node):
            packed[node] = _packed_node(region, node, packed, index, is_key, lengths)
    for node in region.exits:
        for arg in node.all_input_nodes:
            if arg in packed:
                with edit.before(node):
                    node.replace_input_with(arg, _unpack(region, arg, packed[arg], index))


def _others(axis: Axis, dims: int) -> list[int]:
    """Return the dimensions of a value that are neither rows nor sequences, in order: those of its packed form behind rows."""
    return [dim for dim in range(dims) if dim not in (axis.tokens.dim, axis.batch.dim)]


def _pack(region: PaddedRegion, node: fx.Node, axis: Axis, dims: int, index: fx.Node) -> fx.Node:
    """Insert the rows `[N, ...]` that stay of a value with `axis` among `dims` dimensions, to which it is broadcast."""
    edit, aten = region.edit, torch.ops.aten
    shape = [1] * (dims - rank(node)) + [edit.size(n) for n in node.meta["val"].shape]
    if axis.tokens.dim != axis.batch.dim:
        others = _others(axis, dims)
        if dims != rank(node):
            node = edit.call(aten.reshape.default, node, shape)
        order = [axis.batch.dim, axis.tokens.dim, *others]
        if order != list(range(dims)):
            node = edit.call(aten.permute.default, node, order)
        lead = [edit.size(region.batch), edit.size(region.length)]
        if [str(n) for n in node.meta["val"].shape[:2]] != [str(region.batch), str(region.length)]:
            node = edit.call(aten.expand.default, node, [*lead, *[shape[n] for n in others]])
        node = edit.call(aten.reshape.default, node, [-1, *[shape[n] for n in others]])
    return edit.call(aten.index_select.default, node, 0, index)


def _unpack(region: PaddedRegion, node: fx.Node, packed: fx.Node, index: fx.Node) -> fx.Node:
    """Insert a value of the region with all rows, those of padding 0."""
    edit, aten, axis = region.edit, torch.ops.aten, region.axis[node]
    others = _others(axis, rank(node))
    tail = [edit.size(node.meta["val"].shape[n]) for n in others]
    batch, length = edit.size(region.batch), edit.size(region.length)
    rows = (
        edit.call(operator.mul, batch, length)
        if not isinstance(batch, int) or not isinstance(length, int)
        else batch * length
    )
    value = packed.meta["val"]
    zeros = edit.call(aten.zeros.default, [rows, *tail], dtype=value.dtype, device=value.device)
    flat = edit.call(aten.index_copy.default, zeros, 0, index, packed, like=node)
    if axis.tokens.dim == axis.batch.dim:
        return flat
    whole = edit.call(aten.reshape.default, flat, [batch, length, *tail], like=node)
    here = [axis.batch.dim, axis.tokens.dim, *others]
    order = [here.index(dim) for dim in range(rank(node))]
    return whole if order == sorted(order) else edit.call(aten.permute.default, whole, order, like=node)


_DIM = {
    "unbind": 1,
    "select": 1,
    "slice": 1,
    "squeeze": 1,
    "split": 2,
    "split_with_sizes": 2,
    "chunk": 2,
    "cat": 1,
    "topk": 2,
}
"""Where an operation names the dimension that it works along; 0 where it does not say."""


def _packed_node(
    region: PaddedRegion,
    node: fx.Node,
    packed: dict[fx.Node, fx.Node],
    index: fx.Node,
    is_key: fx.Node,
    lengths: fx.Node,
) -> fx.Node:
    """Insert the counterpart of a row-by-row node on `[N, ...]`: rows stand in front, all other dimensions in their order."""
    edit, aten, name = region.edit, torch.ops.aten, op_name(node)
    if node.target is torch.ops.eff.attention_v1.default:
        call = AttentionCall.of(node)
        op = torch.ops.eff.attention_packed_v1.default
        return edit.call(op, packed[call.q], packed[call.k], packed[call.v], is_key, lengths, call.scale, like=node)
    source = next(arg for arg in node.all_input_nodes if arg in packed)
    axis, before, dims = region.axis[node], region.axis[source], rank(node)
    others, given = _others(axis, dims), _others(before, rank(source))

    joins = name in ("cat", "stack")

    def moved(arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return arg
        if arg in packed or not isinstance(arg.meta.get("val"), torch.Tensor) or not (joins or name in POINTWISE):
            return packed.get(arg, arg)
        return _beside(region, arg, before if joins else axis, index, rank(source) if joins else dims)

    args: list[Any] = list(fx.node.map_aggregate(node.args, moved))  # type: ignore[arg-type]
    if name in ("contiguous", "clone"):
        return packed[source]
    if name in ("transpose", "permute", "t"):
        order = _order(node, source)
        turned = [0, *[1 + given.index(order[dim]) for dim in others]]
        if turned == sorted(turned):  # rows alone move
            return packed[source]
        return edit.call(aten.permute.default, args[0], turned, like=node)
    if name in VIEWS:
        tail = [edit.size(node.meta["val"].shape[n]) for n in others]
        return edit.call(aten.reshape.default, args[0], [-1, *tail], like=node)
    if name == "expand":
        tail = [edit.size(node.meta["val"].shape[n]) for n in others]
        return edit.call(aten.expand.default, args[0], [-1, *tail], like=node)
    if name in ("unsqueeze", "stack"):
        args[1:2] = [1 + others.index(int(node.args[1]) % dims if len(node.args) > 1 else 0)]  # type: ignore[arg-type]
    elif name in (*ALONG, *REDUCTIONS, *_DIM):
        place = 2 if name == "linalg_vector_norm" else _DIM.get(name, 1)
        named = node.args[place] if len(node.args) > place else (-1 if name in ALONG else 0)
        listed = [named] if isinstance(named, int) else list(named)  # type: ignore[arg-type]
        renamed = [1 + given.index(dim % rank(source)) for dim in listed]
        args[place : place + 1] = [renamed[0] if isinstance(named, int) else renamed]
    return edit.call(node.target, *args, like=node, **node.kwargs)  # type: ignore[arg-type]


def _beside(region: PaddedRegion, arg: fx.Node, axis: Axis, index: fx.Node, dims: int) -> fx.Node:
    """Insert an operand from elsewhere as packed rows take it: one element for each row, or the same for all."""
    edit, shape, lacking = region.edit, arg.meta["val"].shape, dims - rank(arg)
    mine = [n for n in sorted({axis.batch.dim, axis.tokens.dim}) if n >= lacking]
    if any(not (isinstance(shape[n - lacking], int) and shape[n - lacking] == 1) for n in mine):
        return _pack(region, arg, axis, dims, index)
    if not mine:
        return arg
    left = [edit.size(size) for n, size in enumerate(shape) if n + lacking not in mine]
    return edit.call(torch.ops.aten.reshape.default, arg, left)


def _order(node: fx.Node, source: fx.Node) -> list[int]:
    """Return which dimension of its operand each one of a permutation's result is."""
    dims = rank(source)
    if op_name(node) == "permute":
        return [int(d) % dims for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    order = list(range(dims))
    a, b = (int(d) % dims for d in node.args[1:3]) if op_name(node) == "transpose" else (0, dims - 1)  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return order
