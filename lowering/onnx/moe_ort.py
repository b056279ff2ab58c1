"""ONNX Runtime's own MoE for the experts of a layer, whatever its router is.

The operator takes logits and chooses by itself. It gets log(weight) for the experts that were chosen and a number that no choice
reaches for the others, so that it chooses the same ones; its softmax over them gives weight / sum of weights, and its result is
multiplied by that sum. So routers by sigmoid, groups or bias are what they are in the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from effcompile.core.experts import ExpertsCall
from effcompile.core.export_form import Dialect, OnnxForm, Placement, Sites
from effcompile.core.rewrite import Editor
from effcompile.ops import moe

_ATEN = torch.ops.aten
NEVER = -1e4
"""A logit below that of any weight: log of the least positive float32 is -104."""
ROUTED = "eff.routed"
_LEAST = 1e-38


@dataclass(frozen=True)
class OrtExperts(OnnxForm):
    """Find experts with weights on the output side whose gate the operator has: SwiGLU, or one product and relu, gelu or silu."""

    name: ClassVar[str] = "moe"
    order: ClassVar[int] = 2

    def places(self, edit: Editor, dialect: Dialect, sites: Sites) -> Iterator[Placement]:
        """Yield every `eff::moe_v1` in float32 that the operator has attributes for."""
        for node, call, attributes in candidates(edit, dialect):
            with edit.before(node):
                routed = router(edit, call)
                w1, b1, w2, b2 = _weights(edit, call)
            inputs: tuple[fx.Node | None, ...] = (call.x, routed.logits, w1, b1, w2, b2)
            inputs = inputs if b2 is not None else inputs[:-1]

            yield Placement(
                self.name,
                "com.microsoft::MoE",
                inputs,
                (node,),
                _Reference(call, int(call.ids.meta["val"].shape[1])),
                attributes,
                sample=functools.partial(_sample, call),
                values=(node.meta["val"],),
                finish=functools.partial(weighed, node, routed.total),
                site=str(node.meta.get("eff.site", "")),
            )


def candidates(edit: Editor, dialect: Dialect) -> Iterator[tuple[fx.Node, ExpertsCall[fx.Node], dict[str, Any]]]:
    """Yield (node, call, attributes) of every `eff::moe_v1` in float32 whose gate the operators for experts have."""
    if dialect.flavor != "ort":
        return
    for node in list(edit.graph.find_nodes(op="call_function", target=torch.ops.eff.moe_v1.default)):
        call = ExpertsCall.of(node)
        attributes = attributes_of(call)
        if attributes is not None and call.side == "out" and call.x.meta["val"].dtype == torch.float32:
            yield node, call, attributes


def attributes_of(call: ExpertsCall[fx.Node]) -> dict[str, Any] | None:
    """Return what the operator is told of a gate, None where it has no such gate."""
    known: dict[str, Any] = {"k": int(call.ids.meta["val"].shape[1]), "normalize_routing_weights": 1}
    if call.layout == "none":
        if call.act not in ("relu", "gelu", "silu") or call.limit or call.alpha != 1:
            return None
        return {**known, "activation_type": call.act}
    if call.act != "silu":
        return None
    known |= {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": float(call.alpha)}
    known["activation_beta"] = float(call.beta)
    return known | ({"swiglu_limit": float(call.limit)} if call.limit else {})


def weighed(node: fx.Node, total: fx.Node, edit: Editor, made: Sequence[fx.Node]) -> list[fx.Node]:
    """Multiply what an operator gave with weights of sum 1 by the sum that they have."""
    return [edit.call(_ATEN.mul.Tensor, made[0], total, like=node)]


@dataclass(frozen=True)
class Routed:
    """Hold what an operator gets of a choice: logits `[T, E]`, and the sum of the weights of each token `[T, 1]`."""

    ids: fx.Node
    weights: fx.Node
    logits: fx.Node
    total: fx.Node


def router(edit: Editor, call: ExpertsCall[fx.Node]) -> Routed:
    """Return logits that choose what was chosen; their node tells how it was made (`ROUTED`)."""
    experts = int(call.w1.meta["val"].shape[0])

    def logits(ids: Tensor, share: Tensor) -> Tensor:
        empty = torch.full_like(share[:, :1], NEVER).expand(-1, experts)
        return empty.scatter(1, ids.long(), share.float().clamp(min=_LEAST).log())

    total = edit.inline(lambda share: share.float().sum(1, keepdim=True), call.weights)
    made = Routed(call.ids, call.weights, edit.inline(logits, call.ids, call.weights), total)
    made.logits.meta[ROUTED] = made
    return made


def _weights(edit: Editor, call: ExpertsCall[fx.Node]) -> tuple[fx.Node | None, ...]:
    """Return weights `[E, 2 I, H]`, `[E, H, I]` and biases with gate and up in turn."""
    turn = call.layout == "concat"
    first = edit.inline(lambda w: order(w, call.transposed, turn), call.w1)
    second = edit.inline(lambda w: w.transpose(1, 2).contiguous(), call.w2) if call.transposed else call.w2
    bias = call.b1
    if bias is not None and turn:
        bias = edit.inline(lambda b: order(b[..., None], False, True)[..., 0], bias)
    return first, bias, second, call.b2


def order(w: Tensor, transposed: bool, turn: bool) -> Tensor:
    """Return weights of the first product as `[E, out, in]`, gate and up in turn where they lie one behind the other."""
    w = w.transpose(1, 2) if transposed else w
    if turn:
        w = w.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return w.contiguous()


class _Reference:
    """Compute the experts from logits, gate and up in turn, without the sum that follows."""

    def __init__(self, call: ExpertsCall[fx.Node], top_k: int) -> None:
        self.call, self.top_k = call, top_k

    def __call__(self, x: Tensor, logits: Tensor, w1: Tensor, *rest: Tensor) -> Tensor:
        call, given = self.call, list(rest)
        b1 = given.pop(0) if call.b1 is not None else None
        w2 = given.pop(0)
        b2 = given.pop(0) if call.b2 is not None else None
        chosen = logits.topk(self.top_k, 1)
        share = torch.softmax(chosen.values, 1)
        layout = "none" if call.layout == "none" else "interleaved"
        more = (call.act, layout, False, "out", call.alpha, call.beta, call.limit)
        return moe.composed(ExpertsCall(x, chosen.indices, share, w1, b1, w2, b2, *more))


def _sample(call: ExpertsCall[fx.Node]) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    tokens, hidden, inner = 7, 16, 32
    experts, top_k = int(call.w1.meta["val"].shape[0]), int(call.ids.meta["val"].shape[1])
    wide = inner if call.layout == "none" else 2 * inner
    logits = some_logits(tokens, experts, top_k, draw)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    b1, b2 = (None if b is None else some(experts, n) for b, n in ((call.b1, wide), (call.b2, hidden)))
    given = (some(tokens, hidden), logits, some(experts, wide, hidden) / 4, b1, some(experts, hidden, inner) / 4, b2)
    return tuple(x for x in given if x is not None)


def some_logits(tokens: int, experts: int, top_k: int, draw: torch.Generator) -> Tensor:
    """Return logits as `router` makes them, of random experts with random weights."""
    ids = torch.stack([torch.randperm(experts, generator=draw)[:top_k] for _ in range(tokens)])
    return torch.full((tokens, experts), NEVER).scatter(1, ids, torch.rand(tokens, top_k, generator=draw).log())
