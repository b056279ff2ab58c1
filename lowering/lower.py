"""Replace every raised op, and every op that a policy inserted, by the kernel that the plan names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from effcompile.core.errors import RewriteError
from effcompile.core.kernel import AttentionKernel, SparseKernel
from effcompile.core.plan import Plan
from effcompile.core.policy import RAISED, Kernels
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, copy_graph
from effcompile.core.site import AttentionSite

_FAMILY = "attention-kernel"


@dataclass(frozen=True)
class Lowered:
    """Hold a program in which no `eff::` dense op is left, and how often each kernel was used."""

    program: Program
    kernels: tuple[tuple[str, int], ...] = ()


def lower(program: Program, plan: Plan, sites: Sequence[AttentionSite], kernels: Kernels) -> Lowered:
    """Return the lowered program; a site without a choice is our own fault."""
    exact: Mapping[str, AttentionKernel] = {kernel.name: kernel for kernel in kernels.exact}
    sparse: Mapping[tuple[str, str], SparseKernel] = {(kernel.op, kernel.name): kernel for kernel in kernels.sparse}
    ops = {kernel.op for kernel in kernels.sparse}
    by_id = {site.id: site for site in sites}
    counts: dict[str, int] = {}
    for entry in program.entries:
        edit = Editor(copy_graph(entry.graph))
        for node in list(edit.graph.nodes):
            op = op_of(node)
            if op is None or (op != RAISED and op not in ops):
                continue
            site = by_id[node.meta["eff.site"]]
            choice = plan.of(site.id, _FAMILY)
            name = "" if choice is None else choice.policy
            kernel: AttentionKernel | SparseKernel | None = exact.get(name) if op == RAISED else sparse.get((op, name))
            if kernel is None:
                raise RewriteError("EFF-X906", f"the plan has no kernel for its {op}", site=site.id)
            with edit.before(node):
                result = kernel.lower(node, site, edit)
            if result is not node:
                edit.replace(node, result)
                result.meta["eff.site"] = site.id
            counts[name] = counts.get(name, 0) + 1
        program = program.with_graph(entry, edit.finish())
        left = [node for node in edit.graph.nodes if op_of(node) == RAISED]
        assert not left, f"{len(left)} raised ops are left"
    return Lowered(program, tuple(sorted(counts.items())))


def op_of(node: fx.Node) -> str | None:
    """Return the name of an `eff::` op that stands for a site (`eff::attention_v1`), None for every other node."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or "eff.site" not in node.meta:
        return None
    return str(target._schema.name) if target.namespace == "eff" else None
