"""Put forms into a graph: each place is tried alone first, and stays as it is where the operator means something else."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from effcompile.core.errors import RewriteError
from effcompile.core.export_form import OWN, Dialect, OnnxForm, Placement, Sites
from effcompile.core.mask import Mask
from effcompile.core.program import Entry, Input, Program
from effcompile.core.rewrite import VALUE, Editor, copy_graph
from effcompile.core.site import Refusal
from effcompile.lowering.onnx.attention import open_attention
from effcompile.lowering.onnx.complex_numbers import open_complex
from effcompile.lowering.onnx.tensor_scatter import open_writes

ATTENTION = 23
"""The first opset with an operator for attention."""
Probe = Callable[[Placement], Refusal | None]
_NUMBERS = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int32: 6, torch.int64: 7, torch.bool: 9, torch.float16: 10,
    torch.float64: 11, torch.bfloat16: 16,
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """Hold a program with operators of ONNX in it, the functions that they are, how often each form stands, and what was kept."""

    program: Program
    functions: tuple[str, ...]
    placed: tuple[tuple[str, int], ...]
    kept: tuple[tuple[Placement, Refusal], ...]
    sites: tuple[tuple[str, str], ...]
    """(site, form) of every site that a form of ours stands for."""


def lower_onnx(program: Program, dialect: Dialect, forms: Sequence[OnnxForm], probe: Probe, sites_of: Sites) -> Written:
    """Return the program with every form of a dialect in its places."""
    functions: dict[str, str] = {}
    counts: dict[str, int] = {}
    kept: list[tuple[Placement, Refusal]] = []
    sites: list[tuple[str, str]] = []
    for entry in program.entries:
        edit = Editor(copy_graph(entry.graph))
        _tell_values(edit, entry)
        _tidy(edit)
        _zero_empty_rows(edit, sites_of)
        for form in sorted(forms, key=lambda form: (form.order, form.name)):
            for placement in list(form.places(edit, dialect, sites_of)):
                if any(node is not None and node not in edit.graph.nodes for node in placement.outputs):
                    continue  # an earlier place of the same form took it
                refusal = probe(placement) or _put(edit, placement)
                if refusal is None:
                    functions[placement.op] = placement.body
                    counts[form.name] = counts.get(form.name, 0) + 1
                    if placement.site:
                        sites.append((placement.site, form.name))
                    continue
                kept.append((placement, refusal))
                (node,) = [node for node in placement.outputs if node is not None][:1]
                with edit.before(node):
                    other = form.instead(placement, edit)
                if other is not None:
                    edit.replace(node, other)
            edit.prune()
        open_writes(edit)
        open_complex(edit)
        if dialect.opset < ATTENTION:
            open_attention(edit)
        program = program.with_graph(_with_constants(edit, entry), edit.finish())
    bodies = tuple(body for op, body in sorted(functions.items()) if op.startswith(f"{OWN}::"))
    return Written(program, bodies, tuple(sorted(counts.items())), tuple(kept), tuple(sites))


def _tell_values(edit: Editor, entry: Entry) -> None:
    """Put the weights where forms can look at them."""
    known = {item.node: item.value for item in entry.inputs if item.kind in ("parameter", "buffer")}
    for node in edit.graph.find_nodes(op="placeholder"):
        if isinstance(value := known.get(node.name), torch.Tensor):
            node.meta[VALUE] = value


def _with_constants(edit: Editor, entry: Entry) -> Entry:
    """Return the entry with the inputs that forms added."""
    edit.prune()
    made, given = edit.constants(), {item.node: item for item in entry.inputs}
    names = [node.name for node in edit.graph.nodes if node.op == "placeholder"]
    return replace(entry, inputs=tuple(given.get(name) or Input(name, "packed", name, made[name]) for name in names))


def _tidy(edit: Editor) -> None:
    """Remove a squeeze of a dimension that is not 1: torch's translation would squeeze it all the same."""
    aten = torch.ops.aten
    for target in (aten.squeeze.dim, aten.squeeze.dims):
        for node in list(edit.graph.find_nodes(op="call_function", target=target)):
            source = node.args[0]
            if isinstance(source, fx.Node) and source.meta["val"].dim() == node.meta["val"].dim():
                edit.replace(node, source)


def _zero_empty_rows(edit: Editor, sites: Sites) -> None:
    """Let a row of attention without any key be zeros, as it is in torch: torch's translation gives it an average of all values."""
    aten = torch.ops.aten
    for node in list(edit.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)):
        mask = node.args[3] if len(node.args) > 3 else None
        site = sites.get(str(node.meta.get("eff.site", "")))
        proved = site is not None and isinstance(site.mask, Mask) and site.mask.empty_row == "never"
        if proved or not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool:
            continue
        some = edit.shared(("some", mask), (mask,), lambda mask=mask: edit.call(aten.any.dim, mask, -1, True))  # type: ignore[misc]
        with edit.graph.inserting_after(node):
            kept = edit.call(aten.where.ScalarOther, some, node, 0.0, like=node)
        node.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)  # type: ignore[misc]


def _put(edit: Editor, placement: Placement) -> Refusal | None:
    """Insert the operator behind its inputs and before the first reader of its outputs; return why it cannot be there."""
    outputs = [node for node in placement.outputs if node is not None]
    order = {node: place for place, node in enumerate(edit.graph.nodes)}
    given = [node for node in placement.inputs if node is not None]
    first = min(outputs, key=order.__getitem__)
    last = max(given, key=order.__getitem__, default=first)
    own = {*outputs, *placement.inside}
    readers = [user for node in own for user in node.users if user not in own]
    if order[last] >= min((order[user] for user in readers), default=len(order)):
        return Refusal("EFF-E116", "its inputs are made behind a reader of its result")
    anchor = first if order[last] < order[first] else last.next
    try:
        with edit.graph.inserting_before(anchor):
            results = _call(edit, placement)
            made = results if placement.finish is None else placement.finish(edit, results)
    except RewriteError as error:
        return Refusal("EFF-E116", f"its sizes cannot be written: {error.message}")
    pairs = [(old, new) for old, new in zip(placement.outputs, made) if old is not None]
    for old, new in sorted(pairs, key=lambda pair: -order[pair[0]]):
        edit.replace(old, new)
        for node in sorted(placement.inside, key=lambda node: -order[node]):
            if node.graph is edit.graph and node in edit.graph.nodes and not node.users:
                edit.graph.erase_node(node)
    return None


def _call(edit: Editor, placement: Placement) -> Sequence[fx.Node]:
    domain, _, name = placement.op.rpartition("::")
    nodes = [node for node in placement.outputs if node is not None]
    values = placement.values or tuple(node.meta["val"] for node in nodes)
    attributes, ops = _encoded(placement), torch.ops.onnx_symbolic
    shapes = [[edit.size(size) for size in value.shape] for value in values]
    numbers, inputs = [_NUMBERS[value.dtype] for value in values], list(placement.inputs)
    if len(values) == 1:
        one = ops._symbolic.default
        return [edit.call(one, inputs, name, numbers[0], shape=shapes[0], domain=domain, like=nodes[0], **attributes)]
    multi = edit.call(
        ops._symbolic_multi_out.default, inputs, name, numbers, shapes=shapes, domain=domain, **attributes
    )
    return [edit.call(operator.getitem, multi, place) for place in range(len(values))]


def _encoded(placement: Placement) -> dict[str, Any]:
    """Return the attributes as torch's symbolic operators take them: lists by kind, and where each one is."""
    found: dict[str, list[Any]] = {key: [] for key in ("keys", "types", "pos", "ints", "floats", "strs")}
    for key, value in placement.attributes.items():
        many = isinstance(value, list | tuple)
        items: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
        kind = "s" if isinstance(items[0], str) else "f" if isinstance(items[0], float) else "i"
        store = found[{"s": "strs", "f": "floats", "i": "ints"}[kind]]
        found["keys"].append(key)
        found["types"].append(kind + ("s" if many else ""))
        found["pos"].append([len(store), len(store) + len(items)])
        store.extend([int(item) for item in items] if kind == "i" else items)
    empty: dict[str, Any] = {"metadata_props_keys": [], "metadata_props_values": []}
    return {**{f"attr_{key}": values for key, values in found.items()}, **empty}
