"""Find the token streams of a graph: attentions that hand the same tokens on, and what else works on these tokens.

Everything that derives from an attention's result is followed (`token_axis.py`). Behind an attention the stream is one value, the
residual sum that takes its result (the norm over that sum, where the model norms behind it and not before): there tokens can
be dropped or merged, and all that follows works on fewer. An operation that reads tokens gets all of them: the *residual* values
can be put back to the original positions, since a token that was dropped still has the value that it was dropped with. What a
reader needs and is no residual value, a final norm, runs on all tokens (`whole`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.program import Program
from effcompile.core.site import AttentionSite, Refusal
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.prefix import prefix_of
from effcompile.passes.recognize.token_axis import Axis, Follower, Place, Reads, rank

_NORMS = ("layer_norm", "rms_norm")
_HEADS = Axis(Place(2), Place(0))


@dataclass(frozen=True)
class Reader:
    """Describe an operation that needs every token of a stream's value, and why."""

    node: fx.Node
    reason: str

    def __str__(self) -> str:
        source = str(self.node.meta.get("eff.source", "")).rpartition("/site-packages/")[2]
        name = "the result of the graph" if self.node.op == "output" else f"`{op_name(self.node) or self.node.name}`"
        return f"{name}{f' at {source}' if source else ''} ({self.reason})"


@dataclass
class Stream:
    """Hold one stream of `tokens` tokens.

    `sites` are its attentions in order, `axis` the token axis of each value behind the first one, `behind` the value that can be
    shortened behind an attention (by site id), `sides` the operands from elsewhere that have an element for every token, by node,
    `residual` the values that can be restored, `readers` what needs every token, `whole` what runs on all tokens for readers,
    `beyond` the attentions that derive from a reader, `returned` keys and values `[B, H, N, D]` that the graph returns.
    """

    tokens: int
    batch: Any
    sites: list[str] = field(default_factory=list)
    axis: dict[fx.Node, Axis | None] = field(default_factory=dict)
    behind: dict[str, fx.Node] = field(default_factory=dict)
    sides: dict[fx.Node, dict[fx.Node, Axis]] = field(default_factory=dict)
    residual: set[fx.Node] = field(default_factory=set)
    readers: dict[fx.Node, Reader] = field(default_factory=dict)
    whole: set[fx.Node] = field(default_factory=set)
    refusal: Refusal | None = None
    beyond: list[str] = field(default_factory=list)
    returned: set[fx.Node] = field(default_factory=set)


Found = tuple[tuple[AttentionSite, ...], tuple[str, ...], bool, int]
"""A stream's sites in order, what uses a token's position, whether keys are returned, and how many tokens in front never change."""


def recognize_tokens(program: Program, sites: Sequence[AttentionSite]) -> tuple[list[Found], dict[str, Refusal]]:
    """Return what planning has to know of each stream, and why other sites are in no stream."""
    found: list[Found] = []
    refusals: dict[str, Refusal] = {}
    for entry in program.entries:
        there = {node.meta.get("eff.site") for node in entry.graph.graph.nodes}  # a result that nobody reads is gone
        mine = {site.id: site for site in sites if site.entry == entry.name and site.id in there}
        refusals |= {name: Refusal("EFF-R101", "it hands no tokens on") for name in mine}
        for stream in streams(entry.graph.graph, mine, refusals):
            for name in stream.sites:
                if stream.refusal is not None:
                    refusals[name] = stream.refusal
                elif name in stream.behind:
                    del refusals[name]
                else:
                    refusals[name] = Refusal("EFF-R103", "no residual sum takes its result alone")
            held = tuple(mine[name] for name in stream.sites if name in stream.behind)
            if held and stream.refusal is None:
                first = next(n for n in entry.graph.graph.nodes if n.meta.get("eff.site") == stream.sites[0])
                found.append((held, _positions(stream), bool(stream.returned), prefix_of(entry, first)))
    return found, refusals


def _positions(stream: Stream) -> tuple[str, ...]:
    """Return the operations that take a value from outside the stream which is not the stream as it was before."""
    readers = [
        Reader(node, "a value for each position")
        for node, sides in stream.sides.items()
        if any(not _older(side, stream) for side in sides)
    ]
    return tuple(dict.fromkeys(map(str, readers)))


def _older(node: fx.Node, stream: Stream) -> bool:
    """Tell whether a side operand is the stream itself, as it was before its first attention."""
    return any(node in behind.all_input_nodes for behind in stream.behind.values()) or _feeds_norm(node, stream)


def _feeds_norm(node: fx.Node, stream: Stream) -> bool:
    return any(op_name(b) in _NORMS and node in b.args[0].all_input_nodes for b in stream.behind.values())  # type: ignore[union-attr]


def streams(
    graph: fx.Graph, sites: dict[str, AttentionSite], refusals: dict[str, Refusal] | None = None
) -> list[Stream]:
    """Return the streams of a graph; `refusals` takes why a site is in none."""
    refusals = {} if refusals is None else refusals
    found: list[Stream] = []
    for node in graph.nodes:
        name = str(node.meta.get("eff.site", ""))
        if node.target is not torch.ops.eff.attention_v1.default or name not in sites:
            continue
        before = next((s for s in found if name in s.sites or (s.refusal is not None and name in s.beyond)), None)
        if before is not None:
            if name in before.beyond and before.refusal is not None:
                refusals[name] = before.refusal
            continue
        refusal = _unfit(sites[name])
        if refusal is not None:
            refusals[name] = refusal
            continue
        stream = _followed(graph, node, sites)
        found.append(stream)
    return found


def _unfit(site: AttentionSite) -> Refusal | None:
    if site.cross or str(site.q_len) != str(site.kv_len):
        return Refusal("EFF-R101", f"{site.q_len} queries and {site.kv_len} keys: not one sequence of tokens")
    if not isinstance(site.q_len, int):
        return Refusal(
            "EFF-R102", f"the number of tokens is the symbol {site.q_len}", "torch.compile(model, dynamic=False)"
        )
    if site.q_len < 2:
        return Refusal("EFF-R101", "one token")
    return None


def _followed(graph: fx.Graph, first: fx.Node, sites: dict[str, AttentionSite]) -> Stream:
    shape = first.meta["val"].shape
    stream = Stream(int(shape[2]), shape[0])
    rules = Follower(stream.tokens, stream.batch)
    lost: dict[fx.Node, fx.Node] = {}  # what derives from readers -> the first of them
    start = False
    for node in graph.nodes:
        start = start or node is first
        if not start:
            continue
        is_site = node.target is torch.ops.eff.attention_v1.default and node.meta.get("eff.site") in sites
        if node is first or (is_site and _carried(node, stream)):
            stream.sites.append(node.meta["eff.site"])
            stream.axis[node] = _HEADS
            continue
        if is_site and _asks(node, stream, lost):
            stream.axis[node] = _HEADS  # cross attention: each token asks for itself
            continue
        mine = [arg for arg in node.all_input_nodes if arg in stream.axis]
        behind = next((lost[arg] for arg in node.all_input_nodes if arg in lost), None)
        if is_site and behind is not None:
            name = node.meta["eff.site"]
            stream.beyond.append(name)
            if str(sites[name].q_len) == str(stream.tokens) and stream.refusal is None:
                why = f"{stream.readers[behind]} stands between two attentions"
                stream.refusal = Refusal("EFF-R104", why, "a KV cache joins its keys so: use_cache=False")
        if not mine:
            if behind is not None:
                lost[node] = behind
            continue
        known = {arg: axis for arg in mine if (axis := stream.axis[arg]) is not None}
        try:
            if is_site:
                raise Reads("it attends to tokens of two streams")
            if len(known) != len(mine) and not known:
                stream.axis[node] = None  # arithmetic of sizes
                continue
            axis, sides = rules.follow(node, known)
        except Reads as why:
            stream.readers[node] = Reader(node, str(why))
            if not is_site:
                lost[node] = node
            continue
        stream.axis[node] = axis
        if sides:
            stream.sides[node] = sides
    _find_behind(graph, stream)
    _find_residual(graph, stream)
    _find_whole(graph, stream)
    return stream


def _carried(node: fx.Node, stream: Stream) -> bool:
    call = AttentionCall.of(node)
    return all(stream.axis.get(x) == _HEADS for x in (call.q, call.k, call.v))


def _asks(node: fx.Node, stream: Stream, lost: dict[fx.Node, fx.Node]) -> bool:
    call = AttentionCall.of(node)
    others = [arg for arg in node.all_input_nodes if arg is not call.q]
    return stream.axis.get(call.q) == _HEADS and not any(arg in stream.axis or arg in lost for arg in others)


def _find_behind(graph: fx.Graph, stream: Stream) -> None:
    """Find the residual sum behind each attention: it adds what derives from the attention to what does not."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    ids = {
        node.meta["eff.site"]: node
        for node in graph.nodes
        if node.meta.get("eff.site") in stream.sites and node.target is torch.ops.eff.attention_v1.default
    }
    starts = [ids[name] for name in stream.sites]
    for place, site in enumerate(starts):
        end = order[starts[place + 1]] if place + 1 < len(starts) else len(order)
        derived = {site}
        for node in list(graph.nodes)[order[site] + 1 : end]:
            mine = [arg for arg in node.all_input_nodes if arg in derived]
            if not mine or node in stream.readers:
                continue
            derived.add(node)
            if op_name(node) == "add" and len(mine) == 1 and _is_state(node, stream):
                other = next((arg for arg in node.args[:2] if arg is not mine[0]), None)
                carries = isinstance(other, fx.Node) and (other in stream.axis or other in stream.sides.get(node, {}))
                if carries:
                    stream.behind[site.meta["eff.site"]] = _normed(node)
                    break


def _normed(node: fx.Node) -> fx.Node:
    """Return the norm over a residual sum, where nothing but that norm reads the sum and several operations read the norm."""
    users = list(node.users)
    if len(users) == 1 and op_name(users[0]) in _NORMS and users[0].args[0] is node and len(users[0].users) > 1:
        return users[0]
    return node


def _is_state(node: fx.Node, stream: Stream) -> bool:
    return stream.axis.get(node) == Axis(Place(1), Place(0)) and rank(node) == 3


def _find_residual(graph: fx.Graph, stream: Stream) -> None:
    behind = set(stream.behind.values())
    post = any(op_name(node) in _NORMS for node in behind)
    sums: set[fx.Node] = set()
    for node in graph.nodes:
        if node in behind:
            stream.residual.add(node)
        elif not _is_state(node, stream):
            continue
        elif op_name(node) == "add" and any(arg in stream.residual for arg in node.all_input_nodes):
            (sums if post else stream.residual).add(node)
        elif post and op_name(node) in _NORMS and node.args[0] in sums:
            stream.residual.add(node)


def _find_whole(graph: fx.Graph, stream: Stream) -> None:
    """Find what has to run on all tokens for readers; refuse the stream where that reaches into an attention."""
    inside = _ancestors(
        [
            node
            for node in stream.axis
            if node.meta.get("eff.site") in stream.sites and node.target is torch.ops.eff.attention_v1.default
        ]
    )
    waiting = [(reader, arg) for node, reader in stream.readers.items() for arg in node.all_input_nodes]
    while waiting:
        reader, node = waiting.pop()
        if node not in stream.axis or node in stream.residual or node in stream.whole:
            continue
        if node in inside and reader.node.op == "output" and stream.axis[node] == _HEADS:
            stream.returned.add(node)
            continue
        if node in inside or node.meta.get("eff.site") in stream.sites:
            stream.refusal = stream.refusal or _within(reader, stream)
            continue
        stream.whole.add(node)
        waiting.extend((reader, arg) for arg in node.all_input_nodes)


def _within(reader: Reader, stream: Stream) -> Refusal:
    return Refusal("EFF-R104", f"{reader} needs every token of a value inside a layer")


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [arg for node in nodes for arg in node.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found
