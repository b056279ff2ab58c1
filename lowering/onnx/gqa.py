"""GroupQueryAttention of ONNX Runtime: attention with its cache in one operator, also over a cache in 8 or 4 bits.

It takes the new keys and values and those of before, appends and attends, so that no repeated heads exist. Into a cache that is a
buffer it writes. It is causal where the
site has become causal without a mask; else the mask is added to the scores, whatever it keeps. The operator wants one sequence at
a time where several tokens come behind a cache: a prompt in pieces.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import Tensor, fx

from effcompile.core.export_form import Dialect, OnnxForm, Placement, Sites
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite
from effcompile.lowering.onnx.piece import Given, hint, piece, sample_of

_ATEN = torch.ops.aten
_SDPA = _ATEN.scaled_dot_product_attention.default


@dataclass(frozen=True)
class GroupQuery(OnnxForm):
    """Find attention over a cache that grows by concatenation, or without one where it is causal."""

    name: ClassVar[str] = "group-query"
    order: ClassVar[int] = 2

    def places(self, edit: Editor, dialect: Dialect, sites: Sites) -> Iterator[Placement]:
        """Yield every site with one head dimension that has a cache or is causal."""
        if dialect.flavor != "ort":
            return
        for node in list(edit.graph.find_nodes(op="call_function", target=_SDPA)):
            site = sites.get(str(node.meta.get("eff.site", "")))
            if site is None or site.head_dim != site.value_dim or site.sinks:
                continue
            found = self._place(edit, node, site)
            if found is not None:
                yield found

    def _place(self, edit: Editor, node: fx.Node, site: AttentionSite) -> Placement | None:
        q, k, v, mask, _, square = (*node.args, None, 0.0, False)[:6]
        assert all(isinstance(x, fx.Node) for x in (q, k, v))
        held = [_cached(x) for x in (k, v)]
        cached = None not in held
        if not cached and not square:
            return None
        kept = [pair for pair in held if pair is not None] if cached else []
        joined = [pair[0] for pair in kept]
        past, new = ([pair[1] for pair in kept], [pair[2] for pair in kept]) if cached else ([], [k, v])
        scales = [pair[3] for pair in kept if pair[3] is not None]
        if len(scales) not in (0, 2) or not all(_shaped(x, q) for x in new):
            return None
        heads, batch = int(q.meta["val"].shape[1]), q.meta["val"].shape[0]
        kv_heads, total = int(new[0].meta["val"].shape[1]), k.meta["val"].shape[2]
        with edit.before(node):
            flat = [_flat(edit, x) for x in (q, *new)]
            lengths, count = _lengths(edit, batch, total)
            bias = None if not isinstance(mask, fx.Node) else _bias(edit, mask, q)
            rows = [_rows(edit, scale) for scale in scales]
        attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": float(site.scale)}
        attributes["causal"] = int(bool(square))
        if site.softcap:
            attributes["softcap"] = float(site.softcap)
        inputs: list[fx.Node | None] = [*flat, *(past if cached else [None, None]), lengths, count]
        if bias is not None or rows:
            inputs += [None, None, None, bias]
        if rows:
            inputs += [None, *rows]
            bits = 8 if past[0].meta["val"].dtype == torch.int8 else 4
            attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": bits}
        outputs = (node, *joined) if cached else (node, None, None)
        # Several tokens behind a cache run for one sequence alone, so that is what is tried.
        one = {symbol: sympy.Integer(1) for symbol in _symbols(batch, *past)}
        whole = piece([x for x in (q, *new, *past, mask, *scales) if isinstance(x, fx.Node)], [node, *joined], one)
        if whole is None:
            return None
        values = [flat[0].meta["val"], *(x.meta["val"] for x in (joined if cached else new))]

        def finish(edit: Editor, made: Any) -> list[fx.Node]:
            four = edit.call(_ATEN.reshape.default, made[0], [edit.size(batch), -1, heads, site.head_dim])
            return [edit.call(_ATEN.transpose.int, four, 1, 2, like=node), *made[1:]]

        given = [x for x in inputs if x is not None]
        return Placement(
            self.name,
            "com.microsoft::GroupQueryAttention",
            tuple(inputs),
            outputs,
            _Reference(
                whole, given, flat, past, mask if isinstance(mask, fx.Node) else None, bias, rows, scales, cached
            ),
            attributes,
            sample=lambda: _sampled(given, lengths, count, bias, rows, total, attributes, one),
            values=tuple(values),
            finish=finish,
            inside=whole.inside,
            # What lies behind the tokens of a buffer stays only where the memory is the same.
            shared=((3, 1), (4, 2)) if cached and joined[0].target == _ATEN.slice_scatter.default else (),
            site=site.id,
        )


class _Reference:
    """Run the piece of the graph on what the operator takes."""

    def __init__(
        self, whole: Any, given: Any, flat: Any, past: Any, mask: Any, bias: Any, rows: Any, scales: Any, cached: bool
    ) -> None:
        self.whole, self.given, self.flat, self.past = whole, given, flat, past
        self.mask, self.bias, self.rows, self.scales, self.cached = mask, bias, rows, scales, cached

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        known = dict(zip(self.given, values, strict=True))
        inputs = []
        heads = {node: node for node in self.flat}
        for node in self.whole.inputs:
            if node is self.mask:
                bias = known[self.bias]
                inputs.append(bias == 0 if node.meta["val"].dtype == torch.bool else bias)
            elif node in known:
                inputs.append(known[node])
            elif node in self.scales:
                inputs.append(
                    known[self.rows[self.scales.index(node)]].reshape([int(n) for n in node.meta["val"].shape])
                )
            else:
                source = next(x for x in heads if x.args[0].args[0] is node)
                value = known[source]
                inputs.append(value.unflatten(2, (int(node.meta["val"].shape[1]), -1)).transpose(1, 2))
        out, *joined = self.whole(*inputs)
        flat = out.transpose(1, 2).flatten(2)
        if self.cached:
            return flat, *joined
        return flat, *inputs[1:3]


def _sampled(
    given: Any,
    lengths: fx.Node,
    count: fx.Node,
    bias: fx.Node | None,
    rows: Any,
    total: Any,
    attributes: Any,
    one: Given,
) -> tuple[Tensor, ...]:
    size = hint(total, one)
    made: dict[fx.Node, Any] = {
        lengths: lambda: torch.full([hint(lengths.meta["val"].shape[0], one)], size - 1, dtype=torch.int32),
        count: lambda: torch.tensor(size, dtype=torch.int32),
    }
    step = 3.0 / (2 ** (attributes.get("kv_cache_bit_width", 8) - 1) - 1)  # so that three deviations are in reach
    for row in rows:
        made[row] = lambda row=row: step * torch.linspace(0.7, 1.3, int(row.meta["val"].shape[0]))
    if bias is not None:
        made[bias] = lambda: _some_bias(bias, one)
    return sample_of(given, made, one)


def _some_bias(bias: fx.Node, one: Given) -> Tensor:
    value = bias.meta["val"]
    batch, heads, rows, columns = (hint(n, one) for n in value.shape)
    order = torch.arange(columns)[None] <= torch.arange(rows)[:, None] + columns - rows
    pads = torch.arange(columns)[None] >= 1 + (torch.arange(batch) % 2)[:, None]
    keep = order[None, None] & pads[:, None, None]
    fill = torch.finfo(value.dtype).min
    return torch.where(keep, 0.0, fill).to(value.dtype).expand(batch, heads, rows, columns).contiguous()


def _symbols(batch: Any, *past: fx.Node) -> set[Any]:
    sizes = [batch, *(x.meta["val"].shape[0] for x in past)]
    return {symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}


def _cached(x: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None] | None:
    """Return (all, before, new, scales or None) of keys that are those of before and new ones, as floats or as codes.

    What lies between codes and numbers is only followed here; the piece of the graph is run to see what it means. Of a buffer
    attention reads the part that has tokens.
    """
    written = x.args[0] if x.target == _ATEN.slice.Tensor else None
    if isinstance(written, fx.Node) and written.target == _ATEN.slice_scatter.default:
        held, new = written.args[:2]
        if isinstance(held, fx.Node) and isinstance(new, fx.Node) and held.op == "placeholder":
            return written, held, new, None
        return None
    joined, scale = (x, None) if x.target == _ATEN.cat.default else _numbers(x)
    if joined is None or joined.target != _ATEN.cat.default:
        return None
    parts, dim = (*joined.args, 0)[:2]
    if dim not in (2, -2) or len(parts) != 2 or parts[0].op != "placeholder":  # type: ignore[arg-type, index, union-attr]
        return None
    before, new = parts  # type: ignore[misc]
    if scale is None:
        return joined, before, new, None
    made = _made_of(new)
    return None if made is None else (joined, before, made, scale)


def _numbers(x: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """Return the codes and the scales that keys are made of."""
    scale: fx.Node | None = None
    node: Any = x
    while isinstance(node, fx.Node):
        name = _name(node)
        if name == "mul":
            scale = _base(node.args[1])
            node = node.args[0]
        elif name in ("to", "_to_copy", "sub", "view", "reshape", "flatten", "bitwise_and", "__and__"):
            node = node.args[0]
        elif name == "stack":
            node = node.args[0][0]  # type: ignore[index]
        else:
            break
    return (node, scale) if isinstance(node, fx.Node) and scale is not None else (None, None)


def _made_of(codes: Any) -> fx.Node | None:
    """Return the numbers that codes were made of: what is divided by the scales."""
    node: Any = codes
    while isinstance(node, fx.Node) and _name(node) != "div":
        node = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(node, fx.Node):
        return None
    source = node.args[0]
    while isinstance(source, fx.Node) and _name(source) in ("to", "_to_copy"):
        source = source.args[0]
    return source if isinstance(source, fx.Node) else None


def _base(x: Any) -> fx.Node | None:
    while isinstance(x, fx.Node) and _name(x) in ("unsqueeze", "slice", "alias", "detach"):
        x = x.args[0]
    return x if isinstance(x, fx.Node) and x.op == "placeholder" else None


def _name(node: fx.Node) -> str:
    return node.target._schema.name.split("::")[-1] if isinstance(node.target, torch._ops.OpOverload) else ""


def _shaped(x: fx.Node, q: fx.Node) -> bool:
    return x.meta["val"].dim() == 4 and x.meta["val"].dtype == q.meta["val"].dtype


def _flat(edit: Editor, x: fx.Node) -> fx.Node:
    batch, heads, _, width = x.meta["val"].shape
    turned = edit.call(_ATEN.transpose.int, x, 1, 2)
    return edit.call(_ATEN.reshape.default, turned, [edit.size(batch), -1, int(heads) * int(width)])


def _lengths(edit: Editor, batch: Any, total: Any) -> tuple[fx.Node, fx.Node]:
    size = edit.size(total)
    last = size - 1 if isinstance(size, int) else edit.call(operator.sub, size, 1)
    lengths = edit.call(_ATEN.full.default, [edit.size(batch)], last, dtype=torch.int32)
    return lengths, edit.call(_ATEN.scalar_tensor.default, size, dtype=torch.int32)


def _bias(edit: Editor, mask: fx.Node, q: fx.Node) -> fx.Node:
    kind = q.meta["val"].dtype
    if mask.meta["val"].dtype != torch.bool:
        return mask

    def make() -> fx.Node:
        return edit.inline(lambda keep: torch.where(keep, 0.0, torch.finfo(kind).min).to(kind), mask)

    return edit.shared(("bias", mask, kind), (mask,), make)


def _rows(edit: Editor, scale: fx.Node) -> fx.Node:
    return edit.call(_ATEN.reshape.default, scale, [-1])
