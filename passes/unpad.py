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
    POINTWISE,
    SHAPES,
    PaddedRegion,
    RowsRefused,
    attention_calls,
    common_start,
    padded_calls,
    plan_rows,
)


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
        packed = {start: _pack(region, start, index)}
    for node in ordered:
        with edit.before(node):
            packed[node] = _packed_node(region, node, packed, index, is_key, lengths)
    for node in region.exits:
        for arg in node.all_input_nodes:
            if arg in packed:
                with edit.before(node):
                    node.replace_input_with(arg, _unpack(region, arg, packed[arg], index))


def _pack(region: PaddedRegion, node: fx.Node, index: fx.Node) -> fx.Node:
    edit, aten = region.edit, torch.ops.aten
    value = node.meta["val"]
    tail = [edit.size(n) for n in value.shape[2:]]
    lead = [edit.size(region.batch), edit.size(region.length)]
    if [str(n) for n in value.shape[:2]] != [str(region.batch), str(region.length)]:
        node = edit.call(aten.expand.default, node, [*lead, *tail])
    flat = edit.call(aten.reshape.default, node, [-1, *tail])
    return edit.call(aten.index_select.default, flat, 0, index)


def _unpack(region: PaddedRegion, node: fx.Node, packed: fx.Node, index: fx.Node) -> fx.Node:
    edit, aten = region.edit, torch.ops.aten
    tail = [edit.size(n) for n in node.meta["val"].shape[2:]]
    batch, length = edit.size(region.batch), edit.size(region.length)
    rows = (
        edit.call(operator.mul, batch, length)
        if not isinstance(batch, int) or not isinstance(length, int)
        else batch * length
    )
    if node in region.heads:  # packed, heads are behind rows
        tail = [edit.size(node.meta["val"].shape[n]) for n in (1, 3)]
    value = packed.meta["val"]
    zeros = edit.call(aten.zeros.default, [rows, *tail], dtype=value.dtype, device=value.device)
    flat = edit.call(aten.index_copy.default, zeros, 0, index, packed)
    rows_first = edit.call(aten.reshape.default, flat, [batch, length, *tail], like=node)
    return edit.call(aten.transpose.int, rows_first, 1, 2, like=node) if node in region.heads else rows_first


def _packed_node(
    region: PaddedRegion,
    node: fx.Node,
    packed: dict[fx.Node, fx.Node],
    index: fx.Node,
    is_key: fx.Node,
    lengths: fx.Node,
) -> fx.Node:
    """Insert the counterpart of a row-by-row node on `[N, ...]` values; heads stay behind rows: [B, H, S, D] is [N, H, D]."""
    edit, name = region.edit, op_name(node)
    if node.target is torch.ops.eff.attention_v1.default:
        call = AttentionCall.of(node)
        op = torch.ops.eff.attention_packed_v1.default
        return edit.call(op, packed[call.q], packed[call.k], packed[call.v], is_key, lengths, call.scale, like=node)
    if name in ("transpose", "permute"):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return packed[source]
    if name in ("contiguous", "clone"):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return packed[source]
    if name in SHAPES:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        tail = [edit.size(n) for n in node.meta["val"].shape[2:]]
        return edit.call(torch.ops.aten.reshape.default, packed[source], [-1, *tail], like=node)
    rank = node.meta["val"].dim() if isinstance(node.meta["val"], torch.Tensor) else 0

    def moved(arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return arg
        if arg in packed:
            return packed[arg]
        value = arg.meta.get("val")
        if isinstance(value, torch.Tensor) and rank and value.dim() == rank and name in POINTWISE:
            if all(isinstance(n, int) and n == 1 for n in value.shape[:2]):
                return edit.call(torch.ops.aten.reshape.default, arg, [1, *[edit.size(n) for n in value.shape[2:]]])
            return _pack(region, arg, index)
        return arg

    args = list(fx.node.map_aggregate(node.args, moved))  # type: ignore[arg-type]
    if name in ("softmax", "mean", "sum"):
        args[1] = [-1] if isinstance(args[1], list | tuple) else -1
    if name == "split" and len(args) > 2:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        args[2] = int(args[2]) % source.meta["val"].dim() - 1
    return edit.call(node.target, *args, like=node, **node.kwargs)  # type: ignore[arg-type]
