"""Tell a graph that ends where a loop over experts begins: what transformers' own experts leave when nobody replaced them."""

from __future__ import annotations

from torch import fx

from effcompile.core.program import Program
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.expert_sites import Naming


def loop_behind(program: Program, name_of: Naming) -> str:
    """Return the module whose loop over experts broke the graph, '' where none did.

    The loop asks which experts are hit: a one-hot of the ids, turned so that experts come first. Nothing else in a graph that ends
    in a break looks like it.
    """
    if not program.breaks:
        return ""
    for entry in program.entries:
        for node in entry.graph.graph.nodes:
            if op_name(node) == "one_hot" and any(_turned(user) for user in node.users):
                return name_of(node)[0] or "the model"
    return ""


def _turned(node: fx.Node) -> bool:
    return op_name(node) == "permute" and list(node.args[1]) == [2, 1, 0]  # type: ignore[arg-type]
