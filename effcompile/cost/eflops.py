"""Price a whole generation in FLOP-equivalents (Kinetics, arXiv 2506.05333).

`eFLOP = FLOP + I x bytes`, `I` the FLOP per byte at the ridge of the device's roofline. The published model leaves
weight bytes out (it assumes a huge batch) and adds compute and traffic as if they never overlapped; here the weights
are in and both combinations are offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import sympy


@dataclass(frozen=True)
class Decoder:
    """Hold the sizes of a decoder: active parameters, layers, query and KV heads, head width."""

    parameters: Any
    layers: Any
    heads: Any
    kv_heads: Any
    head_dim: Any

    @property
    def kv_elements(self) -> Any:
        """Return the cached elements per token, k and v of all layers."""
        return 2 * self.kv_heads * self.head_dim * self.layers

    @property
    def group(self) -> Any:
        """Return the query heads per KV head."""
        return sympy.sympify(self.heads) / self.kv_heads


@dataclass(frozen=True)
class GenerationCost:
    """Hold the FLOP, KV bytes and weight bytes of one task of `trials` generations."""

    flops: Any
    kv_bytes: Any
    weight_bytes: Any

    def eflops(self, intensity: Any, combine: Literal["add", "max"] = "add") -> Any:
        """Return FLOP-equivalents; `add` as published, `max` where compute and traffic overlap (a roofline)."""
        traffic = intensity * (self.kv_bytes + self.weight_bytes)
        return self.flops + traffic if combine == "add" else sympy.Max(self.flops, traffic)


def tokens_read(prompt: Any, output: Any, budget: Any, *, continuous: bool = False) -> Any:
    """Return `sum over t < output of min(budget, prompt + t)`, the cached tokens read under a budget, in closed form.

    With `h = clip(budget - prompt, 0, output)` steps below the budget it is `prompt h + h (h - 1) / 2 + budget
    (output - h)`. `continuous` integrates over t instead (`h^2 / 2`), which is what the closed dense formula does.
    """
    prompt, output, budget = sympy.sympify(prompt), sympy.sympify(output), sympy.sympify(budget)
    below = sympy.Min(output, sympy.Max(0, budget - prompt))
    growing = below**2 / 2 if continuous else below * (below - 1) / 2
    return prompt * below + growing + budget * (output - below)


def dense(
    model: Decoder,
    prompt: Any,
    output: Any,
    *,
    trials: Any = 1,
    batch: Any = 1,
    kv_bytes: Any = 2,
    weight_bytes: Any = 2,
) -> GenerationCost:
    """Price dense decoding: `trials` generations of `output` tokens after a `prompt` whose KV cache they share.

    `batch` tasks are decoded together and share every read of the weights.
    """
    prompt, output = sympy.sympify(prompt), sympy.sympify(output)
    shared, own = prompt * output, trials * output**2 / 2
    return GenerationCost(
        flops=2 * trials * model.parameters * output
        + 2 * model.group * model.kv_elements * (trials * prompt * output + own),
        kv_bytes=kv_bytes * model.kv_elements * (shared + own),
        weight_bytes=weight_bytes * model.parameters * output / batch,
    )


def block_sparse(
    model: Decoder,
    prompt: Any,
    output: Any,
    budget: Any,
    *,
    page: Any = 16,
    trials: Any = 1,
    batch: Any = 1,
    kv_bytes: Any = 2,
    weight_bytes: Any = 2,
) -> GenerationCost:
    """Price block top-k decoding: at most `budget` tokens read per step, chosen by one vector per `page` of keys.

    The pages of the prompt differ between trials, so that only the page vectors of the prompt are shared.
    """
    prompt, output = sympy.sympify(prompt), sympy.sympify(output)
    read = trials * tokens_read(prompt, output, budget, continuous=True)
    half = model.kv_elements / sympy.Integer(2)  # the selector reads keys only
    searched = (prompt * output * trials + trials * output**2 / 2) / page
    searched_once = (prompt * output + trials * output**2 / 2) / page
    return GenerationCost(
        flops=2 * trials * model.parameters * output + 2 * model.group * (model.kv_elements * read + half * searched),
        kv_bytes=kv_bytes * (model.kv_elements * read + half * searched_once),
        weight_bytes=weight_bytes * model.parameters * output / batch,
    )
