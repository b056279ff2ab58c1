"""Cut heads from one attention of a stream to the next, as their results say (SpAtten's cascade of heads).

A head that was cut is in no later layer. Which heads stay is decided for each sequence; how many is a number. What stays are the
rows of the projections and the columns of the product behind the attention that belong to them, gathered for each sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from effcompile.core.expr import HEAD, axes_of
from effcompile.core.mask import Mask
from effcompile.core.rewrite import Editor
from effcompile.core.site import AttentionSite, Refusal
from effcompile.ops.tokens import rows
from effcompile.ops.tokens.choice import keep_top
from effcompile.ops.tokens.heads import head_mass, join, project
from effcompile.passes.recognize.head_axis import HeadPart, heads_of

aten = torch.ops.aten


def heads_differ(site: AttentionSite) -> Refusal | None:
    """Return why the heads of an attention cannot be cut: its mask is not the same for all of them. Else None."""
    if isinstance(site.mask, Mask) and HEAD in axes_of(site.mask.keep):
        return Refusal("EFF-R106", f"mask {site.mask}: each head has its own")
    return None


class HeadCascade:
    """Hold which heads of a stream are left, `index` `[B, K]` places among all in rising order, None while all are."""

    def __init__(self, edit: Editor, keys: fx.Node, stable: bool) -> None:
        self.edit, self.stable = edit, stable
        self.heads = self.count = keys.meta["val"].shape[1]
        self.index: fx.Node | None = None
        self._mass: fx.Node | None = None
        self._inside: dict[fx.Node, HeadPart] = {}

    def enter(self, attention: fx.Node) -> None:
        """Note where the heads of an attention lie that comes behind the first one that heads are cut behind."""
        part = heads_of(attention)
        assert isinstance(part, HeadPart), part
        self._inside.update(dict.fromkeys((*part.axis, part.end), part))

    def part(self, node: fx.Node) -> HeadPart | None:
        """Return where heads lie in the sub-layer that a node stands in, None where all heads are left."""
        return self._inside.get(node)

    def projected(self, node: fx.Node, x: fx.Node, part: HeadPart) -> fx.Node:
        """Insert the projection `node` of x `[B, N, C]` for the heads that are left."""
        before, heads = part.starts[node].before, part.heads

        def product(x: Tensor, weight: Tensor, index: Tensor, *bias: Tensor) -> Tensor:
            return project(x, weight, bias[0] if bias else None, index, before, heads)

        return self.edit.inline(product, x, *self._operands(node))

    def joined(self, node: fx.Node, x: fx.Node, part: HeadPart) -> fx.Node:
        """Insert the projection behind the attention for the heads that are left."""
        before, heads = part.place.before, part.heads

        def product(x: Tensor, weight: Tensor, index: Tensor, *bias: Tensor) -> Tensor:
            return join(x, weight, bias[0] if bias else None, index, before, heads)

        return self.edit.inline(product, x, *self._operands(node))

    def _operands(self, node: fx.Node) -> list[Any]:
        bias = node.args[2] if len(node.args) > 2 else None
        return [node.args[1], self.index, *([] if bias is None else [bias])]

    def taken(self, value: fx.Node, dim: int, batch: int) -> fx.Node:
        """Insert the elements of the heads that are left, along dimension `dim`; `batch` is that of the sequences."""
        missing = max(0, -batch)
        for _ in range(missing):
            value = self.edit.call(aten.unsqueeze.default, value, 0)
        token, lead = dim + missing, batch + missing
        return self.edit.inline(lambda x, where: rows.take_along(x, where, lead, token), value, self.index)

    def observe(self, attention: fx.Node, real: fx.Node | None) -> None:
        """Add up what each head gives: the absolute values of its result."""
        group = int(attention.meta["val"].shape[1]) // self.count

        def mass(result: Tensor, *rest: Tensor) -> Tensor:
            return head_mass(result, group, rest[0] if rest else None)

        got = self.edit.inline(mass, attention, *([] if real is None else [real]))
        self._mass = got if self._mass is None else self.edit.call(aten.add.Tensor, self._mass, got)

    def shorten(self, count: int) -> None:
        """Keep the `count` heads that gave most so far."""
        stable = self.stable

        def best(mass: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            kept = keep_top(mass, None, None, count, stable)
            return mass.gather(1, kept), rest[0].gather(1, kept) if rest else kept

        assert self._mass is not None
        given = [self._mass, *([] if self.index is None else [self.index])]
        self._mass, self.index = self.edit.inline_all(best, *given)
        self.count = count


def one_for_all(edit: Editor, mask: fx.Node | None) -> fx.Node | None:
    """Insert a mask tensor for one head, where it holds the same for every head."""
    if mask is None or mask.meta["val"].dim() < 3 or mask.meta["val"].shape[-3] == 1:
        return mask
    return edit.call(aten.slice.Tensor, mask, mask.meta["val"].dim() - 3, 0, 1)
