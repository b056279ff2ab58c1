"""MoEGroupRouter of ONNX Runtime: sigmoid scores, a bias, the best groups, and of those the best experts (DeepSeek-V3).

It gives log(score) of the experts that are chosen and a number that no choice reaches elsewhere, which is what MoE and QMoE are
given in any case (`moe_ort.py`); their softmax makes score / sum of scores of it. So the whole choice of a layer is one operator,
and what is left is the sum of a token's weights: a number where they were divided by their sum. Papers: arXiv:2412.19437.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from effcompile.core.export_form import Dialect, OnnxForm, Placement, Sites
from effcompile.core.rewrite import Editor
from effcompile.lowering.onnx.moe_ort import ROUTED, Routed
from effcompile.lowering.onnx.piece import Piece, hint, piece

_ATEN = torch.ops.aten
_NEVER = -100.0
"""Below log of any score, which the operator takes to be 1e-20 at least, and near enough that a probe sees the others."""
_NEAR = 1e-5


@dataclass(frozen=True)
class Choice:
    """Hold a router that was found: logits `[T, E]` and bias `[E]` in, ids and weights out of `whole`; `scale` of the weights.

    `normed` tells that the weights of a token are divided by their sum before they are scaled.
    """

    logits: fx.Node
    bias: fx.Node
    whole: Piece
    groups: int
    best_groups: int
    group_top: int
    top_k: int
    scale: float = 1.0
    normed: bool = False

    def attributes(self) -> dict[str, int | float]:
        """Return what the operator is told."""
        return {
            "n_group": self.groups, "topk_group": self.best_groups, "group_topk": self.group_top, "top_k": self.top_k,
            "router_sentinel": _NEVER,
        }  # fmt: skip


@dataclass(frozen=True)
class GroupRouter(OnnxForm):
    """Find such a router in front of an operator of experts."""

    name: ClassVar[str] = "group-router"
    order: ClassVar[int] = 4

    def places(self, edit: Editor, dialect: Dialect, sites: Sites) -> Iterator[Placement]:
        """Yield the logits that were made for MoE and QMoE where such a router chose."""
        if dialect.flavor != "ort":
            return
        for node in list(edit.graph.nodes):
            routed = node.meta.get(ROUTED)
            if isinstance(routed, Routed) and routed.logits is node and (found := choice_of(routed)) is not None:
                yield _place(routed, found)


def _place(routed: Routed, found: Choice) -> Placement:
    def finish(edit: Editor, made: Sequence[fx.Node]) -> list[fx.Node]:
        def total(log_scores: Tensor) -> Tensor:
            if found.normed:
                return torch.full_like(log_scores[:, :1], found.scale)
            return log_scores.exp().sum(1, keepdim=True) * found.scale

        return [made[0], edit.inline(total, made[0])]

    def reference(logits: Tensor, bias: Tensor) -> Tensor:
        # The weights of the graph, times what makes scores of them, so that other weights than such scores are seen.
        ids, weights = found.whole(logits, bias)
        scores = logits.sigmoid().gather(1, ids)
        share = weights / weights.sum(1, keepdim=True) * scores.sum(1, keepdim=True)
        return torch.full_like(logits, _NEVER).scatter(1, ids, share.log())

    return Placement(
        "group-router",
        "com.microsoft::MoEGroupRouter",
        (found.logits, found.bias),
        (routed.logits, routed.total),
        reference,
        found.attributes(),
        sample=lambda: _sample(found, 1),
        values=(routed.logits.meta["val"],),
        finish=finish,
    )


def choice_of(routed: Routed) -> Choice | None:
    """Return the router that made ids and weights; None for another one."""
    ids, weights = _source(routed.ids), _source(routed.weights)
    best = ids.args[0] if ids.target == _GETITEM and ids.args[1] == 1 else None
    if not isinstance(best, fx.Node) or best.target != _TOPK:
        return None
    behind = _behind([ids, weights])
    scores = [node for node in behind if node.target == _ATEN.sigmoid.default]
    tops = [node for node in behind if node.target == _TOPK]
    if len(scores) != 1 or len(tops) != 3:
        return None
    logits = scores[0].args[0]
    added = [node for node in scores[0].users if node.target == _ATEN.add.Tensor and node in behind]
    if len(added) != 1 or not isinstance(logits, fx.Node):
        return None
    bias = next((x for x in added[0].args if x is not scores[0]), None)
    inner = [node for node in tops if node is not best]
    ranks = {_value(node.args[0]).dim(): node for node in inner}
    if not isinstance(bias, fx.Node) or set(ranks) != {2, 3}:
        return None
    if _value(bias).dim() != 1 or any(_value(x).dtype != torch.float32 for x in (logits, bias)):
        return None
    whole = piece([logits, bias], [ids, weights])
    if whole is None:
        return None
    groups = _value(ranks[3].args[0]).shape[1]
    counts = (groups, *(node.args[1] for node in (ranks[2], ranks[3], best)))
    if not all(isinstance(count, int) for count in counts):
        return None
    return _weights_of(Choice(logits, bias, whole, *counts))  # type: ignore[arg-type]


def _weights_of(found: Choice) -> Choice | None:
    """Return the choice with what its weights are of the scores, None where they are anything else."""
    logits, bias = _sample(found, 0)
    ids, weights = found.whole(logits, bias)
    scores, weights = logits.double().sigmoid().gather(1, ids), weights.double()
    for normed in (True, False):
        scale = weights / (scores / scores.sum(1, keepdim=True) if normed else scores)
        if bool(((scale - scale[0, 0]).abs() <= _NEAR * scale[0, 0].abs()).all()):
            number = float(f"{float(scale.mean()):.7g}")  # a factor of a configuration, which float32 blurred
            return replace(found, scale=number, normed=normed)
    return None


def _sample(found: Choice, seed: int) -> tuple[Tensor, Tensor]:
    """Return logits of as many tokens as were traced, and a bias with which most sums are below 0.

    What fills the groups that are left out shows then, unless it is -inf.
    """
    draw = torch.Generator().manual_seed(seed)
    tokens, experts = (hint(n, {}) for n in _value(found.logits).shape)
    return torch.randn(tokens, experts, generator=draw), torch.randn(experts, generator=draw) - 1


_TOPK = _ATEN.topk.default
_GETITEM = operator.getitem


def _value(node: Any) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _source(node: fx.Node) -> fx.Node:
    """Return what a node is a copy of."""
    while node.target in (_ATEN._to_copy.default, _ATEN.to.dtype, _ATEN.alias.default, _ATEN.detach.default):
        before = node.args[0]
        assert isinstance(before, fx.Node)
        if _value(before).dtype != _value(node).dtype:
            break
        node = before
    return node


def _behind(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the nodes that these are made of, up to the scores."""
    seen, waiting = set[fx.Node](), list(nodes)
    while waiting:
        node = waiting.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if node.target != _ATEN.sigmoid.default:
            waiting.extend(node.all_input_nodes)
    return seen
