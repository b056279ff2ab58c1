"""Replace every raised op by the kernel that the plan names, and check that none is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from effcompile.core.errors import RewriteError
from effcompile.core.kernel import AttentionKernel
from effcompile.core.plan import Plan
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, copy_graph
from effcompile.core.site import AttentionSite

_FAMILY = "attention-kernel"


@dataclass(frozen=True)
class Lowered:
    """Hold a program in which no `eff::` dense op is left, and how often each kernel was used."""

    program: Program
    kernels: tuple[tuple[str, int], ...] = ()


def lower(program: Program, plan: Plan, sites: Sequence[AttentionSite], kernels: Sequence[AttentionKernel]) -> Lowered:
    """Return the lowered program; a site without a choice is our own fault."""
    by_name: Mapping[str, AttentionKernel] = {kernel.name: kernel for kernel in kernels}
    by_id = {site.id: site for site in sites}
    counts: dict[str, int] = {}
    for entry in program.entries:
        edit = Editor(copy_graph(entry.graph))
        for node in list(edit.graph.nodes):
            if not is_raised(node):
                continue
            site = by_id[node.meta["eff.site"]]
            choice = plan.of(site.id, _FAMILY)
            if choice is None or choice.policy not in by_name:
                raise RewriteError("EFF-X906", "the plan has no kernel for it", site=site.id)
            with edit.before(node):
                result = by_name[choice.policy].lower(node, site, edit)
            edit.replace(node, result)
            result.meta["eff.site"] = site.id
            counts[choice.policy] = counts.get(choice.policy, 0) + 1
        program = program.with_graph(entry, edit.finish())
        left = [node for node in edit.graph.nodes if is_raised(node)]
        assert not left, f"{len(left)} raised ops are left"
    return Lowered(program, tuple(sorted(counts.items())))


def is_raised(node: fx.Node) -> bool:
    """Tell whether a node is an `eff::` op that only has a meaning, not a kernel."""
    return node.op == "call_function" and node.target is torch.ops.eff.attention_v1.default
