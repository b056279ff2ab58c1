"""Go over a book of codes once, where the graph scores all codes, sorts and averages (codebook features).

A snap is found where its graph is what `effcompile/ops/codebook.py` writes out, operation by operation, and nothing else reads
the scores or the choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import fx

from effcompile.core.plan import Plan
from effcompile.core.program import Program
from effcompile.core.rewrite import Editor, Pass, PassResult, copy_graph
from effcompile.ops import codebook as op
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.template import match, template, written_between


@dataclass(frozen=True)
class FuseCodebook(Pass):
    """Replace scores, top-k and mean of codes by one op."""

    name: ClassVar[str] = "fuse-codebook"
    phase: ClassVar[str] = "raised"

    def run(self, program: Program, plan: Plan) -> PassResult:
        """Return the program with snaps as `eff::codebook_v1`, and a note that says how many there were."""
        count = 0
        for entry in program.entries:
            edit = Editor(copy_graph(entry.graph))
            found = list(_snaps(edit.graph))
            for node, x, codes, top_k in found:
                with edit.before(node):
                    edit.replace(node, edit.call(torch.ops.eff.codebook_v1.default, x, codes, top_k, like=node))
            if found:
                program = program.with_graph(entry, edit.finish())
            count += len(found)
        return PassResult(program, count > 0, (f"{count} codebooks read once",) if count else ())


def _snaps(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node, fx.Node, int]]:
    """Yield the result of each snap with tokens, codes and how many codes are averaged."""
    for topk in [node for node in graph.nodes if op_name(node) == "topk"]:
        operands = _operands(topk)
        top_k = topk.args[1]
        if operands is None or not isinstance(top_k, int):
            continue
        x, codes = operands
        wanted = template(partial(op.written, top_k=top_k), x, codes)
        for node in graph.nodes:
            if node.target != wanted.outputs[0].target:
                continue
            found = match(wanted, node)
            if found is None or topk not in found.values() or written_between(found):
                continue
            inner = {mine for theirs, mine in found.items() if theirs.op != "placeholder" and mine is not node}
            if all(user in inner or user is node for mine in inner for user in mine.users):
                yield node, x, codes, top_k


def _operands(topk: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return tokens and codes where a top-k looks like that of a snap: the shapes to trace with."""
    scores = topk.args[0]
    product = scores.args[0] if isinstance(scores, fx.Node) and op_name(scores) == "div" else None
    if not isinstance(product, fx.Node) or op_name(product) != "einsum" or len(product.args[1]) != 2:  # type: ignore[arg-type]
        return None
    x, codes = product.args[1]  # type: ignore[misc]
    fixed = isinstance(codes, fx.Node) and all(isinstance(size, int) for size in codes.meta["val"].shape)
    if not fixed or not isinstance(x, fx.Node):
        return None
    # In narrower dtypes many codes have one score once it is rounded: which of them the source takes is up to its own rounding.
    return (x, codes) if x.meta["val"].dtype in (torch.float32, torch.float64) else None
