"""Make experts of a layer, and compute them one token and one expert at a time in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from effcompile.core.experts import ExpertsCall, Gate

SILU = Gate()


@dataclass(frozen=True)
class Experts:
    """Hold the operands of `eff::moe_v1`."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    gate: Gate = SILU
    transposed: bool = False
    side: str = "out"

    @property
    def args(self) -> tuple[Any, ...]:
        """Return the arguments of the op."""
        gate = self.gate
        tensors = (self.x, self.ids, self.weights, self.w1, self.b1, self.w2, self.b2)
        return (*tensors, gate.act, gate.layout, self.transposed, self.side, gate.alpha, gate.beta, gate.limit)

    @property
    def call(self) -> ExpertsCall[Tensor]:
        """Return the same by name."""
        return ExpertsCall(*self.args)

    def to(self, dtype: torch.dtype) -> Experts:
        """Return the same in another dtype; weights of tokens stay in float32."""
        cast = [None if t is None else t.to(dtype) for t in (self.x, self.w1, self.b1, self.w2, self.b2)]
        return replace(self, x=cast[0], w1=cast[1], b1=cast[2], w2=cast[3], b2=cast[4])


def make(
    tokens: int,
    hidden: int = 16,
    inner: int = 24,
    experts: int = 5,
    top_k: int = 2,
    gate: Gate = SILU,
    bias: bool = False,
    transposed: bool = False,
    side: str = "out",
    seed: int = 0,
) -> Experts:
    """Return seeded operands; the ids of a token are different."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    wide = inner if gate.layout == "none" else 2 * inner
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(max(tokens, 1))])[:tokens]
    w1, w2 = normal(experts, wide, hidden) * hidden**-0.5, normal(experts, hidden, inner) * inner**-0.5
    if transposed:
        w1, w2 = w1.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    biases = (normal(experts, wide), normal(experts, hidden)) if bias else (None, None)
    weights = torch.rand((tokens, top_k), generator=generator) + 0.1
    return Experts(normal(tokens, hidden), ids, weights, w1, biases[0], w2, biases[1], gate, transposed, side)


def oracle(given: Experts) -> Tensor:
    """Return the result in float64, computed token by token, expert by expert."""
    out = torch.zeros(given.x.shape, dtype=torch.float64)
    for token in range(given.x.shape[0]):
        for place in range(given.ids.shape[1]):
            expert, share = int(given.ids[token, place]), float(given.weights[token, place])
            if not 0 <= expert < given.w1.shape[0]:
                continue
            x = given.x[token].double() * (share if given.side == "in" else 1.0)
            w1, w2 = given.w1[expert].double(), given.w2[expert].double()
            if given.transposed:
                w1, w2 = w1.t(), w2.t()
            inner = w1 @ x if given.b1 is None else w1 @ x + given.b1[expert].double()
            y = w2 @ torch.stack(_gated(inner, given.gate))
            y = y if given.b2 is None else y + given.b2[expert].double()
            out[token] += y if given.side == "in" else share * y
    return out


def _gated(inner: Tensor, gate: Gate) -> Sequence[Tensor]:
    count = len(inner) if gate.layout == "none" else len(inner) // 2
    found = []
    for i in range(count):
        g = inner[2 * i] if gate.layout == "interleaved" else inner[i]
        if gate.limit:
            g = g.clamp(max=gate.limit)
        y = _activated(g, gate)
        if gate.layout != "none":
            u = inner[2 * i + 1] if gate.layout == "interleaved" else inner[count + i]
            u = u.clamp(-gate.limit, gate.limit) if gate.limit else u
            y = y * (u + gate.beta)
        found.append(y)
    return found


def _activated(g: Tensor, gate: Gate) -> Tensor:
    if gate.act == "silu":
        return g / (1 + torch.exp(-gate.alpha * g))
    if gate.act == "gelu":
        return g * 0.5 * (1 + torch.erf(g / math.sqrt(2)))
    if gate.act == "gelu_tanh":
        return g * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    positive = g.clamp(min=0)
    return {"relu": positive, "relu2": positive**2, "identity": g}[gate.act]


def error(found: Tensor, exact: Tensor) -> float:
    """Return the largest error relative to the largest number."""
    if not exact.numel():
        return 0.0
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))
