"""Replace every `eff::moe_v1`, and the two halves of sites with capacity, by the dispatch that the plan names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effcompile.core.errors import RewriteError
from effcompile.core.experts import FAMILY, ExpertDispatch, MoESite
from effcompile.core.plan import Plan
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, copy_graph


def _halves() -> tuple[object, ...]:
    return torch.ops.eff.moe_encode_v1.default, torch.ops.eff.moe_decode_v1.default


def lower_experts(
    program: Program, plan: Plan, sites: Sequence[MoESite], dispatches: Sequence[ExpertDispatch]
) -> Program:
    """Return the program with the experts of every site dispatched; a site without a choice is our own fault."""
    if not sites:
        return program
    by_id, known = {site.id: site for site in sites}, {item.name: item for item in dispatches}
    for entry in program.entries:
        edit = Editor(copy_graph(entry.graph))
        for node in list(edit.graph.nodes):
            if node.target not in (*_halves(), torch.ops.eff.moe_v1.default):
                continue
            site = by_id[node.meta["eff.site"]]
            choice = plan.of(site.id, FAMILY)
            if choice is None or choice.policy not in known:
                raise RewriteError("EFF-X906", "the plan has no dispatch for its experts", site=site.id)
            with edit.before(node):
                result = known[choice.policy].lower(node, site, edit)
            if result is not node:
                edit.replace(node, result)
                result.meta["eff.site"] = site.id
        program = program.with_graph(entry, edit.finish())
    return program
