"""Tell a graph that ends where a loop over experts begins: what transformers' own experts leave when nobody replaced them."""

from __future__ import annotations

from torch import fx

from effcompile.core.program import Program
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.expert_sites import Naming


def loop_behind(program: Program, name_of: Naming) -> str | None:
    """Return the module whose loop over experts broke the graph, '' for the graph's own, None where no loop did.

    The loop asks which experts are hit: a one-hot of the ids, turned so that experts come first. Nothing else in a graph that ends
    in a break looks like it.
    """
    if not program.breaks:
        return None
    for entry in program.entries:
        for node in entry.graph.graph.nodes:
            if op_name(node) == "one_hot" and any(_turned(user) for user in node.users):
                return name_of(node)[0]
    return None


def _turned(node: fx.Node) -> bool:
    return op_name(node) == "permute" and list(node.args[1]) in ([2, 1, 0], [2, 0, 1])  # type: ignore[arg-type]
