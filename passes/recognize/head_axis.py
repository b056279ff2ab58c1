"""Find where the heads of an attention lie: from the projections that make its operands to the one that takes its result.

Heads are followed as tokens are (`token_axis.py`): the rows of a projection's weight are `before` x heads x `after`, whatever views
and permutations stand between it and the attention, one product for queries, keys and values included. Query heads that share
keys go with them, so that the axis counts key heads. All that reads a value with heads has to lie in between: then the
sub-layer runs on some of the heads alone, with the rows and columns of its weights that are theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.program import Program
from effcompile.core.site import AttentionSite, Refusal
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.sublayers import nearest_linears
from effcompile.passes.recognize.token_axis import Axis, Follower, Place, Reads, rank

CODE = "EFF-R116"


@dataclass
class HeadPart:
    """Hold the heads of one attention.

    `starts` are the projections in front of it with the place of its `heads` key heads in the last dimension, `end` the projection
    behind it, `place` that of the heads in what it takes. `axis` says where heads lie in every value in between, `sides` which
    operands from elsewhere have an element for each head.
    """

    heads: int
    starts: dict[fx.Node, Place]
    end: fx.Node
    place: Place
    axis: dict[fx.Node, Axis] = field(default_factory=dict)
    sides: dict[fx.Node, dict[fx.Node, Axis]] = field(default_factory=dict)


def uncuttable(program: Program, sites: Sequence[AttentionSite]) -> Refusal | None:
    """Return why the heads of the attentions of a stream cannot be cut, None where those behind the first one can."""
    if len({site.kv_heads for site in sites}) > 1:
        return Refusal(CODE, "attentions of one stream have different numbers of key heads")
    later = {site.id for site in sites[1:]}
    for entry in program.entries:
        for node in entry.graph.graph.nodes:
            name = node.meta.get("eff.site")
            if node.target is torch.ops.eff.attention_v1.default and name in later:
                found = heads_of(node)
                if isinstance(found, Refusal):
                    return Refusal(CODE, f"at {name}: {found.reason}")
    return None


def heads_of(node: fx.Node) -> HeadPart | Refusal:
    """Return where the heads of an attention lie, or why they cannot be cut."""
    call = AttentionCall.of(node)
    heads, width = call.k.meta["val"].shape[1], call.q.meta["val"].shape[3]
    linears = sorted(nearest_linears((call.q, call.k, call.v)), key=lambda n: n.name)
    if not linears or any(rank(n) != 3 or not isinstance(n.meta["val"].shape[2], int) for n in linears):
        return Refusal(CODE, "queries, keys and values are not projections [B, N, C] by linear layers")
    why = Refusal(CODE, "the heads are no factor of a projection's rows")
    options = [_places(n.meta["val"].shape[2], heads, width) for n in linears]
    for places in itertools.product(*options):
        found = _followed(node, call, dict(zip(linears, places, strict=True)))
        if isinstance(found, HeadPart):
            return found
        why = found
    return why


def _places(rows: int, heads: int, width: int) -> Iterator[Place]:
    """Return where heads can lie in a projection's result: outermost, or behind queries, keys and values."""
    if rows % heads == 0:
        yield Place(2, 1, rows // heads)
        if rows % (heads * width) == 0 and rows > heads * width:
            yield Place(2, rows // (heads * width), width)


def _followed(node: fx.Node, call: AttentionCall, starts: dict[fx.Node, Place]) -> HeadPart | Refusal:
    shape, heads = call.q.meta["val"].shape, int(call.k.meta["val"].shape[1])
    rules, group = Follower(heads, shape[0]), int(shape[1]) // heads
    axis = {start: Axis(place, Place(0)) for start, place in starts.items()}
    sides: dict[fx.Node, dict[fx.Node, Axis]] = {}
    readers: dict[fx.Node, str] = {}
    for item in node.graph.nodes:
        known = {arg: axis[arg] for arg in item.all_input_nodes if arg in axis}
        if item in starts or not known:
            continue
        if item is node:
            wanted = {call.q: Axis(Place(1, 1, group), Place(0)), call.k: _KEYS, call.v: _KEYS}
            if any(axis.get(operand) != place for operand, place in wanted.items()) or len(known) != len(wanted):
                return Refusal(CODE, "the heads do not reach the attention as they leave the projections")
            axis[node] = wanted[call.q]
            continue
        try:
            place, beside = rules.follow(item, known)
        except Reads as stop:
            readers[item] = str(stop)
            continue
        if place is None:
            readers[item] = "it asks for a size"
            continue
        axis[item], sides[item] = place, beside
    return _closed(node, starts, axis, sides, readers, heads)


_KEYS = Axis(Place(1), Place(0))


def _closed(
    node: fx.Node,
    starts: dict[fx.Node, Place],
    axis: dict[fx.Node, Axis],
    sides: dict[fx.Node, dict[fx.Node, Axis]],
    readers: Mapping[fx.Node, str],
    heads: int,
) -> HeadPart | Refusal:
    """Return the part where one projection, and nothing else, reads what has heads."""
    if node not in axis:
        return Refusal(CODE, "the heads do not reach the attention as they leave the projections")
    ends = [item for item in readers if op_name(item) == "linear" and item.args[0] in axis]
    end = next((item for item in ends if _behind(item.args[0], node, axis)), None)  # type: ignore[arg-type]
    for item, reason in readers.items():
        if item is not end:
            name = "the result of the graph" if item.op == "output" else f"`{op_name(item) or item.name}`"
            source = str(item.meta.get("eff.source", "")).rpartition("/site-packages/")[2]
            return Refusal(CODE, f"{name}{f' at {source}' if source else ''} needs every head ({reason})")
    if end is None:
        return Refusal(CODE, "no linear layer takes the attention's result")
    last = axis[end.args[0]]  # type: ignore[index]
    if last.tokens.dim != 2 or last.batch != Place(0) or rank(end) != 3:
        return Refusal(CODE, "the projection behind the attention does not take its heads side by side")
    return HeadPart(heads, starts, end, last.tokens, axis, sides)


def _behind(value: fx.Node, attention: fx.Node, axis: Mapping[fx.Node, Axis]) -> bool:
    """Tell whether a value with heads derives from the attention."""
    waiting, seen = [value], set[fx.Node]()
    while waiting:
        item = waiting.pop()
        if item is attention:
            return True
        if item not in seen:
            seen.add(item)
            waiting.extend(arg for arg in item.all_input_nodes if arg in axis)
    return False
