"""Experts of a layer in ONNX: a Loop over the experts that any token chose, each on its own tokens.

The slots are put into the order of their experts, every expert that was hit multiplies its slice, and the results go back by
index. Experts without tokens cost nothing, so that a decode step reads the weights of top_k experts and a prefill multiplies each
token by its own alone: what an export of all experts on all tokens takes E / top_k times as long for.

With the flavor `ort` the operator is ONNX Runtime's own MoE where the router is what it takes (`moe_ort.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from effcompile.core.experts import ExpertsCall
from effcompile.core.export_form import OWN, Dialect, OnnxForm, Placement, Sites
from effcompile.core.rewrite import Editor
from effcompile.lowering.moe.dense import everywhere
from effcompile.lowering.moe.written import write_out
from effcompile.ops import moe

_KINDS = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "double"}
_NUMBERS = {"float": 1, "float16": 10, "bfloat16": 16, "double": 11}


@dataclass(frozen=True)
class Experts(OnnxForm):
    """Write `eff::moe_v1` as a function over standard operators."""

    name: ClassVar[str] = "expert-loop"
    order: ClassVar[int] = 3

    def places(self, edit: Editor, dialect: Dialect, sites: Sites) -> Iterator[Placement]:
        """Yield every `eff::moe_v1` that is left."""
        for node in edit.graph.find_nodes(op="call_function", target=torch.ops.eff.moe_v1.default):
            call = ExpertsCall.of(node)
            operands = (call.x, call.ids, call.weights, call.w1, call.w2, call.b1, call.b2)
            given = tuple(x for x in operands if x is not None)
            yield Placement(
                self.name,
                f"{OWN}::{_title(call)}",
                given,
                (node,),
                _reference(call),
                body=function(call, dialect.opset),
                sample=functools.partial(sample, call),
                site=str(node.meta.get("eff.site", "")),
            )

    def instead(self, placement: Placement, edit: Editor) -> fx.Node | None:
        """Compute all experts on all tokens."""
        (node,) = placement.outputs
        assert node is not None
        return write_out(node, edit, everywhere)


def _title(call: ExpertsCall[fx.Node]) -> str:
    biased = "".join(name for name, x in (("b1", call.b1), ("b2", call.b2)) if x is not None)
    parts = [call.act, call.layout, "t" if call.transposed else "", call.side, biased, kind_of(call)]
    numbers = "_".join(f"{x:g}" for x in (call.alpha, call.beta, call.limit))
    return "Experts_" + "_".join([*filter(None, parts), numbers]).replace(".", "p").replace("-", "m").replace("+", "")


def kind_of(call: ExpertsCall[fx.Node]) -> str:
    """Return the ONNX word of the dtype of a call."""
    return _KINDS[call.x.meta["val"].dtype]


def _reference(call: ExpertsCall[fx.Node]):  # type: ignore[no-untyped-def]
    def reference(x: Tensor, ids: Tensor, share: Tensor, w1: Tensor, w2: Tensor, *biases: Tensor) -> Tensor:
        given = iter(biases)
        b1, b2 = (None if b is None else next(given) for b in (call.b1, call.b2))
        more = (call.act, call.layout, call.transposed, call.side, call.alpha, call.beta, call.limit)
        return moe.composed(ExpertsCall(x, ids, share, w1, b1, w2, b2, *more))

    return reference


def sample(call: ExpertsCall[fx.Node]) -> tuple[Tensor, ...]:
    """Return small operands of a call's gate and dtypes, with an expert that no token has, and an id that is none."""
    draw = torch.Generator().manual_seed(0)
    tokens, experts, hidden, inner, top_k = 7, 5, 16, 12, 2
    wide = inner if call.layout == "none" else 2 * inner
    kind, share_kind = call.x.meta["val"].dtype, call.weights.meta["val"].dtype

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(kind)

    ids = torch.stack([torch.randperm(experts - 1, generator=draw)[:top_k] for _ in range(tokens)])
    ids[0, 0], ids[1, 1] = experts, -1
    w1, w2 = some(experts, wide, hidden) / 4, some(experts, hidden, inner) / 4
    if call.transposed:
        w1, w2 = w1.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    share = torch.rand(tokens, top_k, generator=draw).to(share_kind)
    b1, b2 = (None if b is None else some(experts, n) for b, n in ((call.b1, wide), (call.b2, hidden)))
    ids = ids.to(call.ids.meta["val"].dtype)
    return tuple(x for x in (some(tokens, hidden), ids, share, w1, w2, b1, b2) if x is not None)


def function(call: ExpertsCall[fx.Node], opset: int) -> str:
    """Return the text of the function that computes a call."""
    kind = kind_of(call)
    wide = "double" if kind == "double" else "float"
    cast = f"Cast <to = {_NUMBERS[wide]}>"
    names = ["x", "ids", "share", "w1", "w2", *(["b1"] if call.b1 else []), *(["b2"] if call.b2 else [])]
    transposed = int(not call.transposed)
    rows = "rows = Gather <axis = 0> (x, token)"
    if call.side == "in":
        rows = f"""plain = Gather <axis = 0> (x, token)
    plain_wide = {cast} (plain)
    own = Gather <axis = 0> (flat_share, slots)
    scaled = Mul (plain_wide, own)
    rows = CastLike (scaled, x)"""
    bias1 = "b1_e = Gather <axis = 0> (b1, expert)\n    g0 = Add (p0, b1_e)" if call.b1 else "g0 = Identity (p0)"
    bias2 = "b2_e = Gather <axis = 0> (b2, expert)\n    y_e = Add (p1, b2_e)" if call.b2 else "y_e = Identity (p1)"
    weigh = "weighed = Identity (by_token)" if call.side == "in" else "weighed = Mul (by_token, share_wide)"
    return f"""<domain: "{OWN}", opset_import: ["" : {opset}]>
{_title(call)} ({", ".join(names)}) => (y)
{{
  all = Constant <value = int64[1] {{-1}}> ()
  zero = Constant <value = int64[1] {{0}}> ()
  one = Constant <value = int64[1] {{1}}> ()
  two = Constant <value = int64[1] {{2}}> ()
  experts = Shape <start = 0, end = 1> (w1)
  top_k = Shape <start = 1, end = 2> (ids)
  hidden = Shape <start = 1, end = 2> (x)
  ids_long = Cast <to = 7> (ids)
  ids_flat = Reshape (ids_long, all)
  slots_n = Shape (ids_flat)
  below = Less (ids_flat, experts)
  above = GreaterOrEqual (ids_flat, zero)
  inside = And (below, above)
  known = Where (inside, ids_flat, experts)
  sorted, order = TopK <axis = 0, largest = 0, sorted = 1> (known, slots_n)
  experts_0 = Squeeze (experts)
  zero_0 = Squeeze (zero)
  one_0 = Squeeze (one)
  numbers = Range (zero_0, experts_0, one_0)
  column = Unsqueeze (numbers, one)
  same = Equal (known, column)
  same_long = Cast <to = 7> (same)
  counts = ReduceSum <keepdims = 0> (same_long, one)
  ends = CumSum (counts, zero)
  starts = Sub (ends, counts)
  nonzero = NonZero (counts)
  hit = Reshape (nonzero, all)
  trips = Size (hit)
  share_wide0 = {cast} (share)
  column_shape = Concat <axis = 0> (all, one)
  flat_share = Reshape (share_wide0, column_shape)
  go = Constant <value = bool {{1}}> ()
  rows_0 = Concat <axis = 0> (zero, hidden)
  floor = Constant <value = {wide}[1] {{0}}> ()
  none = Expand (floor, rows_0)
  seed = SequenceConstruct (none)
  found = Loop (trips, go, seed) <body = each (int64 i, bool c, seq({wide}[m, h]) acc) => (bool c_out, seq({wide}[m, h]) acc_out) {{
    c_out = Identity (c)
    i_1 = Reshape (i, one)
    expert = Gather <axis = 0> (hit, i_1)
    start = Gather <axis = 0> (starts, expert)
    end = Gather <axis = 0> (ends, expert)
    slots = Slice (order, start, end)
    token = Div (slots, top_k)
    {rows}
    w1_e0 = Gather <axis = 0> (w1, expert)
    w1_e = Squeeze (w1_e0, zero)
    p0 = Gemm <transB = {transposed}> (rows, w1_e)
    {bias1}
    {_gate(call, kind, wide)}
    w2_e0 = Gather <axis = 0> (w2, expert)
    w2_e = Squeeze (w2_e0, zero)
    p1 = Gemm <transB = {transposed}> (inner, w2_e)
    {bias2}
    y_wide = {cast} (y_e)
    acc_out = SequenceInsert (acc, y_wide)
  }}>
  some = ConcatFromSequence <axis = 0> (found)
  some_n = Shape <start = 0, end = 1> (some)
  left_n = Sub (slots_n, some_n)
  left_shape = Concat <axis = 0> (left_n, hidden)
  left = Expand (floor, left_shape)
  by_order = Concat <axis = 0> (some, left)
  slots_0 = Squeeze (slots_n)
  places = Range (zero_0, slots_0, one_0)
  back = ScatterElements <axis = 0> (order, order, places)
  by_slot = Gather <axis = 0> (by_order, back)
  three = Concat <axis = 0> (all, top_k, hidden)
  by_token = Reshape (by_slot, three)
  share_wide = Unsqueeze (share_wide0, two)
  {weigh}
  inside_shape = Concat <axis = 0> (all, top_k, one)
  inside_3 = Reshape (inside, inside_shape)
  kept = Where (inside_3, weighed, floor)
  total = ReduceSum <keepdims = 0> (kept, one)
  y = CastLike (total, x)
}}
"""


def _gate(call: ExpertsCall[fx.Node], kind: str, wide: str) -> str:
    """Return the lines that make `inner` of `g0`."""
    lines = [f"g1 = Cast <to = {_NUMBERS[wide]}> (g0)" if kind != wide else "g1 = Identity (g0)"]
    if call.layout == "concat":
        lines.append("g2, u2 = Split <axis = 1, num_outputs = 2> (g1)")
    elif call.layout == "interleaved":
        lines += ["far = Constant <value = int64[1] {9223372036854775807}> ()"]
        lines += ["g2 = Slice (g1, zero, far, one, two)", "u2 = Slice (g1, one, far, one, two)"]
    else:
        lines.append("g2 = Identity (g1)")
    if call.limit:
        lines += [
            f"top = Constant <value = {wide} {{{call.limit}}}> ()",
            f"low = Constant <value = {wide} {{-{call.limit}}}> ()",
        ]
        lines += ["g3 = Min (g2, top)"]
    else:
        lines.append("g3 = Identity (g2)")
    lines += _activation(call, wide)
    if call.layout == "none":
        lines.append("inner_wide = Identity (a)")
    else:
        lines.append("u3 = Clip (u2, low, top)" if call.limit else "u3 = Identity (u2)")
        if call.beta:
            lines += [f"beta = Constant <value = {wide} {{{call.beta}}}> ()", "u4 = Add (u3, beta)"]
        lines.append(f"inner_wide = Mul (a, {'u4' if call.beta else 'u3'})")
    lines.append("inner = CastLike (inner_wide, rows)")
    return "\n    ".join(lines)


def _activation(call: ExpertsCall[fx.Node], wide: str) -> list[str]:
    act = call.act
    if act == "silu":
        if call.alpha == 1:
            return ["s = Sigmoid (g3)", "a = Mul (g3, s)"]
        return [
            f"alpha = Constant <value = {wide} {{{call.alpha}}}> ()",
            "scaled_g = Mul (g3, alpha)",
            "s = Sigmoid (scaled_g)",
            "a = Mul (g3, s)",
        ]
    if act in ("gelu", "gelu_tanh"):
        form = "tanh" if act == "gelu_tanh" else "none"
        return [f'a = Gelu <approximate = "{form}"> (g3)']
    if act == "relu":
        return ["a = Relu (g3)"]
    return ["r = Relu (g3)", "a = Mul (r, r)"] if act == "relu2" else ["a = Identity (g3)"]
