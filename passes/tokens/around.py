"""Run single sub-layers on fewer tokens: merge in front of the projections, unmerge behind them (ToMeSD)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.tokens import Step, TokenReduction
from effcompile.ops.tokens import rows
from effcompile.passes.recognize.sublayers import Sublayer, sublayer_of
from effcompile.passes.tokens.epochs import Merging
from effcompile.passes.tokens.remake import Cut, remade

aten = torch.ops.aten


def shorten_sublayers(
    edit: Editor, policies: Mapping[str, TokenReduction], sites: dict[str, AttentionSite], portable: bool
) -> None:
    """Rewrite the sub-layers of the sites that `policies` names; `sites` takes them as they are then."""
    attention = torch.ops.eff.attention_v1.default
    for node in [n for n in edit.graph.nodes if n.target is attention and n.meta.get("eff.site") in policies]:
        name = node.meta["eff.site"]
        made = sublayer_of(node)
        assert not isinstance(made, Refusal)
        policy, tokens = policies[name], int(made.start.meta["val"].shape[1])
        with edit.before(made.inside[0]):
            call = AttentionCall.of(node)
            step = Step(edit, call, sites[name], 0, tokens, policy.left, portable, None, None, None, {}, made.start)
            kept = policy.choose(step)
            assert kept.source is not None
            whole = edit.call(
                aten.ones.default,
                [edit.size(made.start.meta["val"].shape[0]), tokens],
                dtype=torch.float32,
                device=made.start.meta["val"].device,
            )
            merging = Merging(edit, portable)
            short = merging.rows(made.start, whole, merging.sizes(whole, kept), kept)
        result = _remake(edit, made, short, policy.left)

        with edit.before(made.end):
            edit.replace(made.end, edit.inline(_spread(tokens), result, kept.index, kept.source, kept.into))
        sites[name] = replace(sites[name], q_len=policy.left, kv_len=policy.left)


def _spread(count: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return what gives each of `count` tokens the row of the token that it became part of."""

    def spread(x: Tensor, index: Tensor, source: Tensor, into: Tensor) -> Tensor:
        return rows.take(x, rows.homes(index, source, into, count))

    return spread


def _remake(edit: Editor, made: Sublayer, short: fx.Node, count: int) -> fx.Node:
    """Insert the operations of a sub-layer on merged tokens, each in front of its original; return the last one."""
    found, tokens = {made.start: short}, int(made.start.meta["val"].shape[1])
    for node in made.inside:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: found.get(arg, arg))
        with edit.before(node):
            found[node] = remade(edit, node, args, kwargs, Cut.of(made.axis[node], tokens, count))
    return found[made.end]
