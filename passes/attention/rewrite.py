"""Apply the policies that the plan names, site by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.mask import Mask
from effcompile.core.policy import Policy
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, copy_graph
from effcompile.core.site import AttentionSite


def rewrite_attention(
    program: Program, sites: Sequence[AttentionSite], policies: Mapping[str, Sequence[Policy]]
) -> tuple[Program, tuple[AttentionSite, ...]]:
    """Return the program with each named site rewritten, and the sites as kernels see them from here on.

    `policies` maps site ids to policies, which are applied in order; other sites stay as they are.
    """
    if not policies:
        return program, tuple(sites)
    by_id = {site.id: site for site in sites}
    for entry in program.entries:
        edit = Editor(copy_graph(entry.graph))
        for node in list(edit.graph.nodes):
            name = node.meta.get("eff.site") if _is_raised(node) else None
            if name is None or name not in policies:
                continue
            for policy in policies[name]:
                site = by_id[name]
                with edit.before(node):
                    result = policy.apply(node, site, edit)
                edit.replace(node, result)
                result.meta["eff.site"] = name
                if _is_raised(result) and isinstance(site.mask, Mask):
                    keep = AttentionCall.of(result).keep
                    assert keep is not None
                    by_id[name] = replace(site, mask=replace(site.mask, keep=keep))
                node = result
        program = program.with_graph(entry, edit.finish())
    return program, tuple(by_id[site.id] for site in sites)


def _is_raised(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.eff.attention_v1.default
