"""Hold what each shortening of a stream did, bring older values to the tokens that are left, and put tokens back."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effcompile.core.rewrite import Editor
from effcompile.core.tokens import Kept, Pins, spans
from effcompile.ops.tokens import rows
from effcompile.passes.recognize.token_axis import Axis

aten = torch.ops.aten


class Merging:
    """Insert merges; for other runtimes by products, since not every one adds up scattered values."""

    def __init__(self, edit: Editor, portable: bool) -> None:
        self.edit, self.portable = edit, portable

    def sizes(self, sizes: fx.Node, kept: Kept) -> fx.Node:
        """Insert how many tokens each one stands for after a merge, from those before it `[B, N]`."""
        matrix = self.portable
        operands = (sizes, kept.index, kept.source, kept.into)
        return self.edit.inline(
            lambda a, index, source, into: rows.merge_sizes(a, index, source, into, matrix), *operands
        )

    def rows(self, value: fx.Node, before: fx.Node, after: fx.Node, kept: Kept) -> fx.Node:
        """Insert the merged rows of a value `[B, N, C]`; `before` and `after` say how many tokens each stands for."""
        matrix = self.portable

        def merged(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            return rows.merge(x, *rest, matrix=matrix)  # type: ignore[misc]

        return self.edit.inline(merged, value, before, after, kept.index, kept.source, kept.into)


class Epochs:
    """Count the tokens of each epoch; epoch 0 has all of them."""

    def __init__(self, edit: Editor, batch: Any, tokens: int, portable: bool) -> None:
        self.edit, self.batch, self.counts = edit, batch, [tokens]
        self._merging = Merging(edit, portable)
        self._kept: list[Kept] = []
        self._before: list[fx.Node] = []
        self._positions: list[fx.Node | None] = [None]
        self._sizes: list[fx.Node | None] = [None]
        self._brought: dict[tuple[fx.Node, Axis, int], fx.Node] = {}
        self._held: dict[Any, fx.Node] = {}

    def begin(self, value: fx.Node, kept: Kept, left: int) -> fx.Node:
        """Begin the next epoch: return the stream `[B, N, C]` with the tokens that stay, and those merged into them."""
        edit, epoch = self.edit, len(self.counts) - 1
        self._before.append(value)
        self._kept.append(kept)
        where, sizes = self._positions[epoch], self._sizes[epoch]
        self.counts.append(left)
        places = kept.index if where is None else edit.inline(rows.take, where, kept.index)
        self._positions.append(
            places if kept.weights is None else edit.call(aten.pad.default, places, [0, 1], "constant", -1)
        )
        if kept.source is None:
            self._sizes.append(sizes)
            if kept.weights is not None:
                return edit.inline(rows.take_and_sum, value, kept.index, kept.weights)
            return edit.inline(rows.take, value, kept.index)
        if sizes is None:
            sizes = self._ones(value)
            self._sizes[epoch] = sizes
        merged = self._merging.sizes(sizes, kept)
        self._sizes.append(merged)
        return self._merging.rows(value, sizes, merged, kept)

    def _ones(self, value: fx.Node) -> fx.Node:
        shape = [self.edit.size(self.batch), self.counts[len(self._before) - 1]]
        return self.edit.call(aten.ones.default, shape, dtype=torch.float32, device=value.meta["val"].device)

    def positions(self, epoch: int) -> fx.Node:
        """Return the original positions of the tokens of an epoch, `[B, N]`."""
        where = self._positions[epoch]
        assert where is not None
        return where

    def sizes(self, epoch: int) -> fx.Node | None:
        """Return how many tokens each one stands for, `[B, N]` float32, None before the first merge."""
        return self._sizes[epoch] if any(kept.source is not None for kept in self._kept[:epoch]) else None

    def bring(self, value: fx.Node, axis: Axis, known: int, epoch: int) -> fx.Node:
        """Return a value of epoch `known` with the tokens of a later one."""
        if known == epoch:
            return value
        key = (value, axis, epoch)
        if key not in self._brought:
            if known == 0 and all(kept.source is None and kept.weights is None for kept in self._kept[:epoch]):
                made = self._taken(value, axis, self.positions(epoch))
            else:
                made = self._brought_once(self.bring(value, axis, known, epoch - 1), axis, epoch - 1)
            self._brought[key] = made
        return self._brought[key]

    def _brought_once(self, value: fx.Node, axis: Axis, epoch: int) -> fx.Node:
        kept, last = self._kept[epoch], value.meta["val"]
        if kept.weights is not None and last.dtype.is_floating_point and last.dim() == 3:
            return self.edit.inline(rows.take_and_sum, value, kept.index, kept.weights)
        if kept.source is None or not last.dtype.is_floating_point or last.dim() != 3:
            return self._taken(value, axis, kept.index)
        before, after = self._sizes[epoch], self._sizes[epoch + 1]
        assert before is not None
        assert after is not None
        return self._merging.rows(value, before, after, kept)

    def _taken(self, value: fx.Node, axis: Axis, index: fx.Node) -> fx.Node:
        """Gather along the token axis; a value without a batch, or with one for all sequences, gets one."""
        edit, token, batch = self.edit, axis.tokens.dim, axis.batch.dim
        missing = max(0, -batch)
        for _ in range(missing):
            value = edit.call(aten.unsqueeze.default, value, 0)
        token, batch = token + missing, batch + missing
        return edit.inline(lambda x, where: rows.take_along(x, where, batch, token), value, index)

    def held(self, epoch: int, pinned: Pins, real: fx.Node | None) -> fx.Node | None:
        """Return which tokens of an epoch are pinned, `[B, N]` bool; places count among the real tokens of a sequence."""
        if not pinned:
            return None
        edit, count = self.edit, self.counts[0]
        key = (epoch, pinned, real)
        if key not in self._held:
            where = self._positions[epoch]
            if where is None:
                device = self._device
                row = edit.call(aten.arange.default, count, device=device)
                where = edit.call(aten.expand.default, row, [edit.size(self.batch), count])
            if real is None:
                self._held[key] = edit.inline(lambda at: rows.held(at, spans(pinned), count), where)
            else:
                self._held[key] = edit.inline(lambda at, mask: rows.held_real(at, mask, spans(pinned)), where, real)
        return self._held[key]

    @property
    def _device(self) -> Any:
        return next(n.meta["val"].device for n in self.edit.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor))

    def restore(self, value: fx.Node, axis: Axis, epoch: int) -> fx.Node:
        """Return a value with all tokens at their places."""
        for step in reversed(range(epoch)):
            kept = self._kept[step]
            if kept.source is None:
                value = self.edit.inline(
                    rows.put_back, self._before[step], value, kept.index
                )  # a sum of tokens has no place
            else:
                value = self._unmerged(value, axis, kept, self.counts[step])
        return value

    def _unmerged(self, value: fx.Node, axis: Axis, kept: Kept, count: int) -> fx.Node:
        token, batch = axis.tokens.dim, axis.batch.dim

        def spread(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
            return rows.take_along(x, rows.homes(index, source, into, count), batch, token)

        return self.edit.inline(spread, value, kept.index, kept.source, kept.into)
