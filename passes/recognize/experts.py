"""Raise every recognized mixture of experts to `eff::moe_v1` and a site; say why the rest was left alone.

The walk starts at the sum that puts the experts of a token together and goes back through weighting, second product, gate and
first product to the tokens (idioms: `grouped`, tokens sorted by expert; `batched`, weights fetched for each slot; `dense` and
`einsum`, all experts on all tokens with weights that are 0 outside the chosen ones, expert_dense.py). Routing is not touched: the
source's own top-k gives ids and weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from effcompile.core.experts import MoESite
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, copy_graph
from effcompile.core.site import Missed, Refusal
from effcompile.passes.recognize import expert_capacity as capacity
from effcompile.passes.recognize import expert_dense as dense
from effcompile.passes.recognize import expert_order as order
from effcompile.passes.recognize import expert_parts as parts
from effcompile.passes.recognize.aliases import Aliases, written
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.expert_match import Match, weighted
from effcompile.passes.recognize.expert_parts import Seen, Stop, shape
from effcompile.passes.recognize.expert_sites import Names, Naming, describe
from effcompile.passes.recognize.gates import read_gate
from effcompile.passes.recognize.match import same_size

NO_SUM = Refusal(
    "EFF-M101", "products with the weights of experts, and no sum over the experts of a token that is known"
)


@dataclass(frozen=True)
class RecognizedExperts:
    """Hold the raised program, its sites, and what was missed."""

    program: Program
    sites: tuple[MoESite, ...] = ()
    missed: tuple[Missed, ...] = ()


def recognize_experts(program: Program, name_of: Naming) -> RecognizedExperts:
    """Return the program with each mixture of experts as one `eff::moe_v1` node that carries `meta["eff.site"]`."""
    sites: list[MoESite] = []
    missed: list[Missed] = []
    for entry in program.entries:
        if not any(_concerns(node) for node in entry.graph.graph.nodes):
            continue
        edit = Editor(copy_graph(entry.graph))
        names = Names(entry, name_of)
        reasons: dict[fx.Node, Refusal] = {}
        for node in list(edit.graph.nodes):
            if _is_raised(node) and "eff.site" not in node.meta:
                sites.append(describe(node, "eff.prepare", names))
                continue
            found = match_experts(node, edit.graph)
            if isinstance(found, Match):
                if program.requires_grad:
                    reasons[found.anchor] = Refusal(
                        "EFF-A301", "no gradient flows through the raised op", "run inference under torch.no_grad()"
                    )
                    continue
                sites.append(_raise(found, edit, names))
            elif isinstance(found, Refusal):
                reasons[node] = found
        made, why = capacity.raise_capacity(edit, names, program.requires_grad)
        sites.extend(made)
        missed.extend(Missed(names.site(node, "capacity"), refusal) for node, refusal in why.items())
        missed.extend(_missed(edit.graph, reasons, names))
        program = program.with_graph(entry, edit.finish())
    return RecognizedExperts(program, tuple(sites), tuple(missed))


def match_experts(node: fx.Node, graph: fx.Graph) -> Match | Refusal | None:
    """Return the mixture of experts whose sum is `node`; None where no product with 3-D weights is behind it."""
    summed = op_name(node) == "sum" and len(parts.dims(node)) == 1 and not parts.keeps(node)
    # What a token's experts give has three dimensions; sums of two count tokens, as the router of a next layer does.
    summed = summed and len(shape(node.args[0])) == 3 and node.meta["val"].is_floating_point()  # type: ignore[arg-type]
    if not (summed or dense.is_combine(node)) or not _leads_to_experts(node):
        return None
    seen = Seen([node])
    try:
        if not summed:
            found = dense.combined(node, seen)
        else:
            found = dense.summed(node, seen) if parts.dims(node)[0] in (0, -3) else _routed(node, seen)
        found = replace(found, anchor=_cast(node, found.x, seen))
        _closed(found, graph)
    except Stop as stop:
        return stop.refusal
    return found


def _routed(node: fx.Node, seen: Seen) -> Match:
    """Read the sum over the k slots of a token, of tokens sorted by expert or not."""
    stacked = node.args[0]
    if parts.dims(node)[0] not in (1, -2) or len(shape(stacked)) != 3:  # type: ignore[arg-type]
        raise Stop("EFF-M102", "a sum over another dimension than the experts of a token")
    top_k = shape(stacked)[1]  # type: ignore[arg-type]
    value = parts.through(stacked, seen)
    late = op_name(value) == "mul" and len(shape(value)) == 3
    share: fx.Node | None = None
    if late:
        value, share = weighted(value, seen)
        value = parts.through(value, seen)
    inverse: fx.Node | None = None
    rows = parts.indexed(value)
    if rows is not None and len(shape(value)) == 2:
        inverse = rows
        seen.take(value, "the results in order")
        value = parts.through(value.args[0], seen)
    if share is None:
        if op_name(value) != "mul":
            raise Stop("EFF-M102", f"`{op_name(value) or value.op}` where results are weighted")
        value, share = weighted(value, seen)
    second = parts.product(parts.through(value, seen, "to", "_to_copy", *parts.VIEWS), seen)
    gate = read_gate(second.rows)
    if isinstance(gate, Refusal):
        raise Stop(gate.code, gate.reason)
    seen.path += gate.path
    first = parts.product(gate.source, seen)
    if first.kind != second.kind or first.transposed != second.transposed:
        raise Stop("EFF-M104", "the two products are written in two ways")
    experts = shape(first.weight)[0]
    if first.kind == "grouped":
        if inverse is None:
            raise Stop("EFF-M102", "results in sorted order are not put back")
        ids = order.settle_sorted(seen, experts)
        if not order.is_inverse(inverse, seen):
            raise Stop("EFF-M102", "results are put back in another order than they were taken")
    elif first.kind == "batched":
        if inverse is not None:
            raise Stop("EFF-M102", "the results are put into another order")
        if len(set(seen.biased)) != 1:
            raise Stop("EFF-M104", "weights and biases are fetched by different ids")
        ids = order.flat_ids(seen.biased[0], seen)
    else:
        raise Stop("EFF-M102", "all experts on all tokens, and a sum over something else")
    weights = _share(share, top_k, seen, late)
    x = order.expanded(parts.casts(first.rows, seen), top_k, seen)
    return Match(first.kind, node, x, ids, weights, first, second, gate.gate, seen)


def _share(node: fx.Node, top_k: object, seen: Seen, late: bool) -> fx.Node:
    """Return weights `[T, k]` of one number a row: flat, sorted like the tokens, or `[T, k, 1]`."""
    views = (*parts.VIEWS, "unsqueeze", *parts.COPIES)
    reader = node
    start = len(seen.path)
    node = parts.through(node, seen, *views)
    if seen.order is not None and not late:
        if parts.indexed(node) is not seen.order:
            raise Stop("EFF-M102", "weights are not in the order of the results")
        reader = seen.take(node, "the weights")
        start = len(seen.path)
        node = parts.through(node.args[0], seen, *views)
    for step in (node, *reversed(seen.path[start:])):  # the last view of the form [T, k] is the operand
        if len(shape(step)) == 2 and same_size(shape(step)[1], top_k) and step.meta["val"].is_floating_point():
            if step in seen.path[start:]:
                del seen.path[seen.path.index(step, start) :]
            return seen.read(step, seen.path[-1] if len(seen.path) > start else reader)
    raise Stop("EFF-M102", "the weights are not [T, k]")


def _cast(node: fx.Node, x: fx.Node, seen: Seen) -> fx.Node:
    """Return the node that has the result in x's dtype: the sum, or the cast behind it."""
    kind = x.meta["val"].dtype
    users = list(node.users)
    if len(users) == 1 and op_name(users[0]) in ("to", "_to_copy") and users[0].meta["val"].dtype == kind:
        seen.path.append(users[0])
        return users[0]
    if node.meta["val"].dtype != kind:
        raise Stop("EFF-M105", f"the sum stays in {node.meta['val'].dtype}, the tokens are in {kind}")
    return node


def _closed(found: Match, graph: fx.Graph) -> None:
    """Check shapes and dtypes, that nothing outside reads what lies in between, and that no operand is written to meanwhile."""
    tokens, hidden = shape(found.x)
    if not same_size(shape(found.anchor)[0], tokens) or not same_size(shape(found.ids)[0], tokens):
        raise Stop("EFF-M102", "tokens, ids and results differ in number")
    first, second = found.first, found.second
    inner = shape(second.weight)[1 if second.transposed else 2]
    fits = shape(first.weight)[1 if first.transposed else 2] == hidden
    wide = shape(first.weight)[2 if first.transposed else 1]
    if (
        not fits
        or wide != inner * (1 if found.gate.layout == "none" else 2)
        or (not found.spread and len(shape(found.weights)) != len(shape(found.ids)))
        or (not found.spread and not all(map(same_size, shape(found.weights), shape(found.ids))))
    ):
        raise Stop("EFF-M102", "the shapes of experts, ids and weights do not fit each other")
    if not parts.kinds_agree(found.x, first.weight, second.weight, first.bias, second.bias):
        raise Stop("EFF-M105", "tokens and experts differ in dtype")
    inside = set(found.seen.path)
    operands = {operand for operand, _ in found.seen.reads}
    for node in inside:
        if node in operands or node is found.anchor:
            continue
        outside = [user for user in node.users if user not in inside and not _trivial(user)]
        if outside:
            raise Stop("EFF-M106", f"`{outside[0].name}` reads what lies between the products")
    aliases = Aliases(graph)
    end = aliases.order[found.anchor]
    for operand, reader in found.seen.reads:
        writer = aliases.written_between(operand, aliases.order[reader], end, inside)
        if writer is not None:
            raise Stop("EFF-M106", f"`{writer.name}` writes in place to what the experts read")
    begin = min(aliases.order[node] for node in inside - operands)
    if (fence := aliases.fence_between(begin, end)) is not None:
        raise Stop("EFF-M106", f"`{fence.name}` changes gradients or autocast within the experts")


def _trivial(node: fx.Node) -> bool:
    """Tell whether nobody reads a node, and it writes nothing: the sorted values of a sort, for example."""
    return not node.users and node.op == "call_function" and not written(node)


def _raise(found: Match, edit: Editor, names: Names) -> MoESite:
    anchor, gate = found.anchor, found.gate
    with edit.before(anchor):
        weights = found.weights
        if found.spread:
            weights = edit.call(torch.ops.aten.gather.default, weights, 1, found.ids)
        call = edit.call(
            torch.ops.eff.moe_v1.default,
            found.x,
            found.ids,
            weights,
            found.first.weight,
            found.first.bias,
            found.second.weight,
            found.second.bias,
            gate.act,
            gate.layout,
            found.first.transposed,
            found.side,
            gate.alpha,
            gate.beta,
            gate.limit,
            like=anchor,
        )
    site = describe(call, found.idiom, names)
    edit.replace(anchor, call)
    operands = {operand for operand, _ in found.seen.reads}
    place = {node: number for number, node in enumerate(edit.graph.nodes)}
    inside = {node for node in found.seen.path if node in place and node not in operands}
    for node in sorted(inside, key=place.__getitem__, reverse=True):
        for user in list(node.users):
            if not user.users and user not in inside and _trivial(user):
                edit.graph.erase_node(user)
        if not node.users:  # in-place steps would outlive a removal of dead code
            edit.graph.erase_node(node)
    return site


def _missed(graph: fx.Graph, reasons: dict[fx.Node, Refusal], names: Names) -> Iterator[Missed]:
    """Yield one miss for each module that still multiplies by the weights of experts."""
    left: dict[str, tuple[fx.Node, Refusal]] = {}
    for node in graph.nodes:
        if parts.is_anchor(node):
            left.setdefault(names.owner(node), (node, NO_SUM))
    for node, refusal in reasons.items():
        owner = names.owner(node)
        if owner in left or _behind_anchor(node):
            left[owner] = (node, refusal)
    for node, refusal in left.values():
        yield Missed(names.site(node, "experts"), refusal)


def _behind_anchor(node: fx.Node) -> bool:
    return _leads_to_experts(node)


def _leads_to_experts(node: fx.Node, steps: int = 24) -> bool:
    """Tell whether one of the nodes just before is a product with 3-D weights of the graph's inputs."""
    near, known = [node], {node}
    for _ in range(steps):
        near = [arg for item in near for arg in item.all_input_nodes if arg not in known]
        known.update(near)
        if any(parts.is_anchor(item) or _dense_anchor(item) for item in near):
            return True
        if not near or len(known) > 64:
            return False
    return False


def _dense_anchor(node: fx.Node) -> bool:
    """Tell whether a node multiplies in batches by an input of the graph `[E, out, in]`."""
    einsum = parts.einsum_of_experts(node)
    if einsum is not None:
        return _stacked(einsum.weight)
    return op_name(node) in ("bmm", "baddbmm") and _stacked(node.args[-1])


def _stacked(node: object) -> bool:
    while isinstance(node, fx.Node) and op_name(node) == "transpose":
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "placeholder" and len(shape(node)) == 3


def _is_raised(node: fx.Node) -> bool:
    return node.target is torch.ops.eff.moe_v1.default


def _concerns(node: fx.Node) -> bool:
    return _is_raised(node) or parts.is_anchor(node) or _dense_anchor(node) or capacity.brings_back(node)
