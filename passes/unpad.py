"""Drop padded rows before an encoder's layers and restore them after, where the graph itself proves that nobody reads them.

An encoder computes every padded position and then ignores it: attention masks it as a key, and the pooling multiplies it by zero.
Both facts are visible in the graph. The pass starts at the first activation that all attention layers derive from, follows every
value computed from it, and succeeds only if each one is computed row by row until it is multiplied by a mask that is 0 on
padded rows, or until only row 0 (a CLS head) is taken. Anything else, a returned hidden state above all, is a refusal by name.

Exact for finite activations: a padded row enters the result as `0 * x`. Padded rows that overflow to infinity would give NaN in the
source and 0 here.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from effcompile.core import compat
from effcompile.core.attention_call import AttentionCall
from effcompile.core.expr import BATCH, HEAD, KEY, Expr, axes_of, axis, const, walk
from effcompile.core.mask import key_padding_slot, substitute
from effcompile.core.plan import Plan
from effcompile.core.program import Entry, Program
from effcompile.core.rewrite import Editor, Pass, PassResult, copy_graph, fake_mode_of
from effcompile.core.site import Refusal
from effcompile.passes.recognize.element_rules import rules
from effcompile.passes.recognize.elements import Reader, Unreadable, op_name

_ARITHMETIC = ("add", "sub", "mul", "div", "pow", "sqrt", "rsqrt", "neg", "abs", "exp", "clamp", "to", "erf", "square")
_ACTIVATIONS = ("tanh", "sigmoid", "relu", "gelu", "silu", "elu", "leaky_relu", "hardtanh", "mish")
_POINTWISE = frozenset((*_ARITHMETIC, *_ACTIVATIONS))
_LAST_DIM = frozenset(("linear", "layer_norm", "rms_norm", "softmax", "mean", "sum", "var"))
_SHAPES = ("view", "reshape", "_unsafe_view", "contiguous", "clone")


class _Refused(Exception):
    def __init__(self, code: str, reason: str, hint: str = "") -> None:
        self.refusal = Refusal(code, reason, hint)


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
            except _Refused as stop:
                notes.append(str(stop.refusal))
                continue
            program, changed = program.with_graph(entry, graph), True
            notes.append(f"padded rows dropped around {count} attention sites")
        return PassResult(program, changed, tuple(notes))


@dataclass
class _Region:
    """Hold what is known while rows are followed through the graph."""

    edit: Editor
    batch: Any
    length: Any
    kept: Expr
    source: fx.Node
    packed: dict[fx.Node, fx.Node] = field(default_factory=dict)
    heads: dict[fx.Node, fx.Node] = field(default_factory=dict)  # [B, H, S, D] values, held as packed [N, H, D]
    exits: list[fx.Node] = field(default_factory=list)
    first_row: bool = False


def _unpad(entry: Entry) -> tuple[fx.GraphModule, int]:
    _common_padding(_calls(entry.graph.graph))  # most graphs are refused here, before anything is copied
    edit = Editor(copy_graph(entry.graph))
    calls = _calls(edit.graph)
    kept, source = _common_padding(calls)
    shape = calls[0].q.meta["val"].shape
    region = _Region(edit, shape[0], shape[2], kept, source)
    start = _common_start(calls)
    rows = _plan_rows(region, start, calls)
    _rewrite(region, start, rows)
    return edit.finish(), len(calls)


def _calls(graph: fx.Graph) -> list[AttentionCall]:
    found = [AttentionCall.of(n) for n in graph.nodes if n.target is torch.ops.eff.attention_v1.default]
    if not found:
        raise _Refused("EFF-A400", "no attention site")
    return found


def _common_padding(calls: Sequence[AttentionCall]) -> tuple[Expr, fx.Node]:
    """Return the key-padding condition that is the whole mask of every site, and the tensor it reads."""
    found: set[tuple[Expr, fx.Node]] = set()
    for call in calls:
        site = str(call.node.meta.get("eff.site", "attention"))
        if call.keep is None or call.bias is not None or call.sinks is not None or call.softcap:
            raise _Refused("EFF-A402", f"`{site}` has more than key padding in its mask")
        slot = key_padding_slot(call.keep)
        if slot is None:
            raise _Refused("EFF-A402", f"the mask of `{site}` is not key padding alone")
        if call.empty_row == "nan":
            raise _Refused("EFF-A402", f"`{site}` turns a sequence without keys into NaN")
        if str(call.q.meta["val"].shape[2]) != str(call.k.meta["val"].shape[2]):
            raise _Refused("EFF-A402", f"`{site}` is cross attention")
        load = next(node for node in walk(call.keep) if node.op == "load")
        if BATCH not in axes_of(load):
            raise _Refused("EFF-A402", "one padding row serves the whole batch")
        found.add((call.keep, call.loads[slot]))
    if len(found) != 1:
        raise _Refused("EFF-A402", "the sites have different masks")
    return next(iter(found))


def _upstream(node: fx.Node) -> fx.Node | None:
    """Return the token activation `[B, S, D]` that a query, key or value is projected from."""
    while op_name(node) in ("transpose", "permute", *_SHAPES, "linear", "add", "mul") and isinstance(
        node.args[0], fx.Node
    ):
        done = op_name(node) == "linear"
        node = node.args[0]
        if done:
            return node
    return None


def _common_start(calls: Sequence[AttentionCall]) -> fx.Node:
    starts = {_upstream(x) for x in (calls[0].q, calls[0].k, calls[0].v)}
    if len(starts) != 1 or None in starts:
        raise _Refused("EFF-A403", "query, key and value of the first layer are not projections of one activation")
    start = next(iter(starts))
    assert start is not None
    return start


# --- which rows are read ---------------------------------------------------------------------------------------------------


def _plan_rows(region: _Region, start: fx.Node, calls: Sequence[AttentionCall]) -> list[fx.Node]:
    """Return every node computed from `start` up to the exits, in order; raise where a padded row may be read."""
    inside: set[fx.Node] = {start}
    ordered: list[fx.Node] = []
    sites = {call.node for call in calls}
    for node in region.edit.graph.nodes:
        if node is start or not any(arg in inside for arg in node.all_input_nodes):
            continue
        if node.op == "output":
            raise _Refused("EFF-A401", "padded rows are returned by the graph", "pool inside the compiled module")
        if node in sites:
            call = AttentionCall.of(node)
            if not all(x in inside for x in (call.q, call.k, call.v)):
                raise _Refused("EFF-A403", "a site reads keys from elsewhere")
        elif _reads_first_row(node):
            region.first_row = True
            region.exits.append(node)
            continue
        elif _is_zeroed(region, node, inside):
            region.exits.append(node)
            continue
        elif not _row_by_row(region, node, inside):
            source = str(node.meta.get("eff.source", ""))
            raise _Refused(
                "EFF-A401", f"`{op_name(node) or node.name}` {source} may read padded rows", "pool with the mask"
            )
        inside.add(node)
        ordered.append(node)
    if not sites <= inside:
        raise _Refused("EFF-A403", "some sites do not derive from the first activation")
    if not region.exits:
        raise _Refused("EFF-A403", "nothing leaves the encoder")
    if region.first_row and any(call.empty_row == "uniform" for call in calls):
        raise _Refused("EFF-A402", "a CLS row of an all-padding sequence would average over padded values")
    return ordered


def _reads_first_row(node: fx.Node) -> bool:
    return op_name(node) == "select" and node.args[1] == 1 and node.args[2] == 0


def _is_zeroed(region: _Region, node: fx.Node, inside: set[fx.Node]) -> bool:
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


def _tokens(region: _Region, node: fx.Node) -> bool:
    value = node.meta.get("val")
    return (
        isinstance(value, torch.Tensor)
        and value.dim() >= 3
        and str(value.shape[0]) == str(region.batch)
        and str(value.shape[1]) == str(region.length)
    )


def _row_by_row(region: _Region, node: fx.Node, inside: set[fx.Node]) -> bool:
    """Tell whether each row of the result depends on the same row of the operands alone."""
    name = op_name(node)
    if node.target is operator.getitem:
        return True
    if name in ("transpose", "permute"):
        return _to_heads(node) or _from_heads(node)
    if not _tokens(region, node) and name not in ("split", "chunk", "unbind"):
        return name in _SHAPES and name in ("contiguous", "clone")
    if name in _POINTWISE:
        operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
        return all(arg in inside or _fits_rows(region, arg, node) for arg in operands)
    if name == "layer_norm":
        return len(node.args[1]) <= node.meta["val"].dim() - 2  # type: ignore[arg-type]
    if name in _LAST_DIM:
        return _last_dim_only(node, name)
    if name in _SHAPES:
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


def _fits_rows(region: _Region, arg: fx.Node, node: fx.Node) -> bool:
    """Tell whether an operand from outside is the same for every row, or can be packed with the rows."""
    value = arg.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return True
    return value.dim() <= node.meta["val"].dim() - 2 or value.dim() == node.meta["val"].dim()


# --- rewriting -----------------------------------------------------------------------------------------------------------


def _rewrite(region: _Region, start: fx.Node, ordered: Sequence[fx.Node]) -> None:
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


def _pack(region: _Region, node: fx.Node, index: fx.Node) -> fx.Node:
    edit, aten = region.edit, torch.ops.aten
    value = node.meta["val"]
    tail = [edit.size(n) for n in value.shape[2:]]
    lead = [edit.size(region.batch), edit.size(region.length)]
    if [str(n) for n in value.shape[:2]] != [str(region.batch), str(region.length)]:
        node = edit.call(aten.expand.default, node, [*lead, *tail])
    flat = edit.call(aten.reshape.default, node, [-1, *tail])
    return edit.call(aten.index_select.default, flat, 0, index)


def _unpack(region: _Region, node: fx.Node, packed: fx.Node, index: fx.Node) -> fx.Node:
    edit, aten = region.edit, torch.ops.aten
    tail = [edit.size(n) for n in node.meta["val"].shape[2:]]
    batch, length = edit.size(region.batch), edit.size(region.length)
    rows = (
        edit.call(operator.mul, batch, length)
        if not isinstance(batch, int) or not isinstance(length, int)
        else batch * length
    )
    value = packed.meta["val"]
    zeros = edit.call(aten.zeros.default, [rows, *tail], dtype=value.dtype, device=value.device)
    flat = edit.call(aten.index_copy.default, zeros, 0, index, packed)
    return edit.call(aten.reshape.default, flat, [batch, length, *tail], like=node)


def _packed_node(
    region: _Region, node: fx.Node, packed: dict[fx.Node, fx.Node], index: fx.Node, is_key: fx.Node, lengths: fx.Node
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
    if name in _SHAPES:
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
        if isinstance(value, torch.Tensor) and rank and value.dim() == rank and name in _POINTWISE:
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
