"""Find the sub-layer of a self-attention: from the activation that is projected to queries, keys and values to what comes back.

In between every operation works token by token but the attention itself (`token_axis.py`), so that the sub-layer can run on fewer
tokens, wherever it stands and whatever happens to the tokens before and behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.program import Program
from effcompile.core.site import AttentionSite, Refusal
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.token_axis import Axis, Follower, Place, Reads

_STATE, _HEADS = Axis(Place(1), Place(0)), Axis(Place(2), Place(0))


@dataclass
class Sublayer:
    """Hold where a sub-layer starts and ends, its operations in order, axes, and operands that have an element for each token."""

    start: fx.Node
    end: fx.Node
    axis: dict[fx.Node, Axis]
    inside: list[fx.Node] = field(default_factory=list)
    sides: dict[fx.Node, dict[fx.Node, Axis]] = field(default_factory=dict)

    @property
    def positions(self) -> tuple[str, ...]:
        """Return the operations that take a value of a token's position."""
        names = [str(node.meta.get("eff.source", "")) or node.name for node in self.inside if self.sides.get(node)]
        return tuple(dict.fromkeys(names))


def recognize_sublayers(
    program: Program, sites: Sequence[AttentionSite]
) -> tuple[list[tuple[tuple[AttentionSite, ...], tuple[str, ...], bool, int]], dict[str, Refusal]]:
    """Return each site that has a sub-layer as `recognize_tokens` returns streams, and why other sites have none."""
    found: list[tuple[tuple[AttentionSite, ...], tuple[str, ...], bool, int]] = []
    refusals: dict[str, Refusal] = {}
    for entry in program.entries:
        mine = {site.id: site for site in sites if site.entry == entry.name}
        for node in entry.graph.graph.nodes:
            site = mine.get(str(node.meta.get("eff.site", "")))
            if site is None or node.target is not torch.ops.eff.attention_v1.default:
                continue
            result = sublayer_of(node)
            if isinstance(result, Refusal):
                refusals[site.id] = result
            else:
                found.append(((site,), result.positions, False, 0))
    return found, refusals


def sublayer_of(node: fx.Node) -> Sublayer | Refusal:
    """Return the sub-layer of an attention, or why there is none."""
    call = AttentionCall.of(node)
    tokens, keys = (x.meta["val"].shape[2] for x in (call.q, call.k))
    if str(tokens) != str(keys):
        return Refusal("EFF-R101", f"{tokens} queries and {keys} keys: not one sequence of tokens")
    if not isinstance(tokens, int):
        return Refusal(
            "EFF-R102", f"the number of tokens is the symbol {tokens}", "torch.compile(model, dynamic=False)"
        )
    starts = {linear.args[0] for linear in nearest_linears((call.q, call.k, call.v))}
    start = next(iter(starts)) if len(starts) == 1 else None
    if not isinstance(start, fx.Node) or start.meta["val"].dim() != 3 or start.meta["val"].shape[1] != tokens:
        return Refusal("EFF-R114", "queries, keys and values are not projections of one activation [B, N, C]")
    return _followed(start, node, call)


def nearest_linears(operands: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the nearest linear layers behind some values, all that they derive from on the way."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    waiting = list(operands)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if op_name(node) == "linear":
            found.add(node)
        else:
            waiting.extend(node.all_input_nodes)
    return found


def _followed(start: fx.Node, attention: fx.Node, call: AttentionCall) -> Sublayer | Refusal:
    shape = start.meta["val"].shape
    rules = Follower(int(shape[1]), shape[0])
    axis: dict[fx.Node, Axis] = {start: _STATE}
    sides: dict[fx.Node, dict[fx.Node, Axis]] = {}
    begun = ended = False
    end = None
    for node in attention.graph.nodes:
        begun = begun or node is start
        known = {arg: axis[arg] for arg in node.all_input_nodes if arg in axis}
        if not begun or node is start or not known:
            continue
        if node is attention:
            if any(axis.get(x) != _HEADS for x in (call.q, call.k, call.v)):
                return Refusal("EFF-R104", "an operation between the projections and the attention needs every token")
            axis[node] = _HEADS
            ended = True
            continue
        try:
            place, beside = rules.follow(node, known)
        except Reads:
            continue
        if place is None:
            continue
        axis[node], sides[node] = place, beside
        if ended and op_name(node) == "linear" and place == _STATE and _derives(node, attention):
            end = node
            break
    if end is None:
        return Refusal("EFF-R103", "no linear layer takes the attention's result, token by token")
    made = Sublayer(start, end, axis, sides=sides)
    needed = _between(made)
    made.inside = [node for node in attention.graph.nodes if node in needed]
    return made


def _derives(node: fx.Node, source: fx.Node) -> bool:
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        now = waiting.pop()
        if now is source:
            return True
        if now not in seen:
            seen.add(now)
            waiting.extend(now.all_input_nodes)
    return False


def _between(made: Sublayer) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    waiting = [made.end]
    while waiting:
        node = waiting.pop()
        if node not in needed and node is not made.start:
            needed.add(node)
            waiting.extend(arg for arg in node.all_input_nodes if arg in made.axis)
    return needed
