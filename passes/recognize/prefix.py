"""Count the tokens in front of a sequence that are the same for every input: class, distillation and register tokens.

They are parameters, joined to the tokens that derive from the input. A policy that drops or merges tokens by what they show pins
them: a model keeps there what it needs of the whole image (arXiv:2309.16588).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from effcompile.core.attention_call import AttentionCall
from effcompile.core.program import Entry
from effcompile.passes.recognize.elements import op_name
from effcompile.passes.recognize.sublayers import nearest_linears
from effcompile.passes.recognize.token_axis import POINTWISE, rank

_ALONE = ("layer_norm", "rms_norm", "contiguous", "clone", "dropout")


def prefix_of(entry: Entry, attention: fx.Node) -> int:
    """Return how many tokens `[B, N, C]` in front of an attention's projections do not depend on the user's inputs."""
    given = {item.node for item in entry.inputs if item.kind == "user"}
    starts = {linear.args[0] for linear in nearest_linears([AttentionCall.of(attention).q])}
    start = next(iter(starts)) if len(starts) == 1 else None
    if not isinstance(start, fx.Node) or rank(start) != 3:
        return 0
    found = _Prefix(given).of(start)
    return 0 if found >= start.meta["val"].shape[1] else int(found)


class _Prefix:
    def __init__(self, given: set[str]) -> None:
        self._given = given
        self._depends: dict[fx.Node, bool] = {}

    def of(self, node: fx.Node) -> float:
        """Return how many leading elements along dimension 1 of a value `[B, N, C]` are the same for every input."""
        if not self._reads_input(node):
            size = node.meta["val"].shape[1] if rank(node) == 3 else 1
            return math.inf if size == 1 or not isinstance(size, int) else size
        name = op_name(node)
        if rank(node) != 3:
            return 0
        if name == "cat" and len(node.args) > 1 and int(node.args[1]) % 3 == 1:  # type: ignore[call-overload]
            return self._joined(node.args[0])
        if name == "slice" and int(node.args[1]) % 3 == 1:  # type: ignore[call-overload]
            return self._cut(node)
        if name in POINTWISE or name in _ALONE:
            return min(self.of(arg) for arg in node.all_input_nodes if _is_tensor(arg) and rank(arg) == 3)
        return 0

    def _joined(self, parts: Any) -> float:
        total = 0.0
        for part in parts:
            size = part.meta["val"].shape[1]
            here = self.of(part) if self._reads_input(part) else size
            total += min(here, size)
            if here < size:
                break
        return total

    def _cut(self, node: fx.Node) -> float:
        begin, step = (node.args[2] if len(node.args) > 2 else 0), (node.args[4] if len(node.args) > 4 else 1)
        size = node.meta["val"].shape[1]
        if not isinstance(begin, int) or begin < 0 or step != 1:
            return 0
        return min(max(0.0, self.of(node.args[0]) - begin), size)  # type: ignore[arg-type]

    def _reads_input(self, node: fx.Node) -> bool:
        """Tell whether a value, and not only its size, derives from an input of the user."""
        waiting, seen = [node], set[fx.Node]()
        while waiting:
            item = waiting.pop()
            if self._depends.get(item) or item.name in self._given:
                self._depends[node] = True
                return True
            if item not in seen and item not in self._depends:
                seen.add(item)
                waiting.extend(arg for arg in item.all_input_nodes if _is_tensor(arg))
        self._depends[node] = False
        return False


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
