"""Make an operation anew on fewer tokens, or on fewer heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from effcompile.core.rewrite import Editor
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.token_axis import VIEWS, Axis, Place

aten = torch.ops.aten
_END = 2**62  # from here on an end of a slice says: to the end


@dataclass(frozen=True)
class Cut:
    """Say that an axis at a place had `before` elements and has `after` now."""

    place: Place
    before: int
    after: int

    @classmethod
    def of(cls, axis: Axis | None, before: int, after: int) -> tuple[Cut, ...]:
        """Return the cut of a value's axis; none where there is no axis, or nothing is cut."""
        return () if axis is None or before == after else (cls(axis.tokens, before, after),)


def remade(edit: Editor, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], cuts: Sequence[Cut]) -> fx.Node:
    """Insert an operation with shorter operands; a shape that it names gets the new numbers where its axes lie."""
    name, op = op_name(node), node.target
    if cuts and (name in VIEWS or name == "expand"):
        shape = [_extent(edit, size, dim, cuts) for dim, size in enumerate(node.meta["val"].shape)]
        return edit.call(aten.expand.default if name == "expand" else aten.reshape.default, args[0], shape, like=node)
    if name in ("split", "split_with_sizes", "slice"):
        args = _parts(name, list(args), [cut for cut in cuts if cut.place.dim == _dim_of(name, node)])
    return edit.call(op, *args, like=node, **kwargs)  # type: ignore[arg-type]


def _extent(edit: Editor, size: Any, dim: int, cuts: Sequence[Cut]) -> Any:
    mine = [cut for cut in cuts if cut.place.dim == dim]
    if not mine:
        return edit.size(size)
    factor = size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)
    for cut in mine:
        factor = factor / cut.before * cut.after
    return int(factor) if factor.is_Integer else edit.symbolic(factor)


def _dim_of(name: str, node: fx.Node) -> int:
    source, place = node.args[0], 1 if name == "slice" else 2
    dim = node.args[place] if len(node.args) > place else 0
    return int(dim) % source.meta["val"].dim()  # type: ignore[arg-type, union-attr, call-overload]


def _parts(name: str, args: list[Any], cuts: Sequence[Cut]) -> list[Any]:
    """Return operands whose sizes along the merged dimension that is cut are those of shorter parts."""
    places = range(2, min(4, len(args))) if name == "slice" else (1,)
    for cut in cuts:
        for place in places:
            size = args[place]
            if isinstance(size, list | tuple):
                args[place] = [part // cut.before * cut.after for part in size]
            elif isinstance(size, int) and -_END < size < _END:
                args[place] = size // cut.before * cut.after
    return args
