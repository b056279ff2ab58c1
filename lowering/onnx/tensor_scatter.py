"""TensorScatter, opset 24: write the tokens of a call into a cache that is a buffer.

A runtime that has one piece of memory for the buffer before and after copies nothing else. In earlier opsets, and where a runtime
computes something else, the write is a concatenation of what is before, the tokens, and what is behind (`open_writes`), which
copies the buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from effcompile.core.export_form import Dialect, OnnxForm, Placement, Sites
from effcompile.core.rewrite import Editor
from effcompile.lowering.onnx.piece import hint, sample_of

_ATEN = torch.ops.aten
_WRITE = _ATEN.slice_scatter.default
OPSET = 24


@dataclass(frozen=True)
class TensorScatter(OnnxForm):
    """Find writes of tokens `[B, H, S, D]` into inputs `[B, H, capacity, D]`, all sequences at one place."""

    name: ClassVar[str] = "tensor-scatter"
    order: ClassVar[int] = 5

    def places(self, edit: Editor, dialect: Dialect, sites: Sites) -> Iterator[Placement]:
        """Yield every such write that is left."""
        if dialect.opset < OPSET:
            return
        for node in list(edit.graph.find_nodes(op="call_function", target=_WRITE)):
            held, new, dim, start, _, step = _arguments(node)
            if not isinstance(held, fx.Node) or not isinstance(new, fx.Node) or step != 1:
                continue
            if held.op != "placeholder" or held.meta["val"].dim() != 4 or dim not in (2, -2) or start is None:
                continue
            if held.meta["val"].dtype != new.meta["val"].dtype:
                continue
            batch, first = held.meta["val"].shape[0], start.meta["val"] if isinstance(start, fx.Node) else start
            with edit.before(node):
                places = edit.call(_ATEN.full.default, [edit.size(batch)], start, dtype=torch.int64)
            given = (held, new, places)
            yield Placement(
                self.name,
                "TensorScatter",
                given,
                (node,),
                _reference,
                {"axis": -2, "mode": "linear"},
                sample=lambda given=given, first=first: _sample(given, first),  # type: ignore[misc]
                values=(node.meta["val"],),
            )


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return what is written into, what, along which dimension, from where, to where, and in which steps."""
    return (*node.args, *(0, None, None, 1)[len(node.args) - 2 :])


def _reference(held: Tensor, new: Tensor, places: Tensor) -> Tensor:
    made = held.clone()
    for row, place in enumerate(places.tolist()):
        made[row, :, place : place + new.shape[2]] = new[row]
    return made


def _sample(given: tuple[fx.Node, ...], first: int | torch.SymInt) -> tuple[Tensor, ...]:
    rows = hint(given[0].meta["val"].shape[0], {})
    return sample_of(given, {given[2]: lambda: torch.full([rows], hint(first, {}))}, {})


def open_writes(edit: Editor) -> None:
    """Write out every such write that is left as a concatenation."""
    for node in list(edit.graph.find_nodes(op="call_function", target=_WRITE)):
        held, new, dim, start, end, step = _arguments(node)
        if not isinstance(held, fx.Node) or step != 1 or start is None or end is None:
            continue
        with edit.before(node):
            before = edit.call(_ATEN.slice.Tensor, held, dim, 0, start)
            behind = edit.call(_ATEN.slice.Tensor, held, dim, end, 2**63 - 1)
            edit.replace(node, edit.call(_ATEN.cat.default, [before, new, behind], dim, like=node))
