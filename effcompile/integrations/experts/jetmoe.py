"""Replace JetMoE's experts, and let its mixture of attention heads stay in one graph.

The router reads on the host how many tokens each expert has, which breaks a graph, and sorts the tokens by expert. Here it leaves
the counts on the device, and the products of attention experts, which have no second product, are grouped ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effcompile.core.experts import Gate
from effcompile.core.site import Refusal
from effcompile.integrations.experts.attach import aside, attach, moe, put
from effcompile.integrations.experts.mlp import activation
from effcompile.integrations.experts.source import unknown_code

CLASS, ATTENTION = "JetMoeMoE", "JetMoeMoA"


def prepare(module: Any) -> Refusal | None:
    """Let a `JetMoeMoE` run its experts through one op, or return why not."""
    why = unknown_code(module, {"forward": "60d1b12eeb21"}) or _parts(module)
    if why is not None:
        return why
    act = activation(module.activation)
    if isinstance(act, Refusal):
        return act
    module.__dict__["_eff_gate"] = Gate(act)
    _replace_parts(module)
    attach(module, _run)
    return None


def prepare_attention(module: Any) -> Refusal | None:
    """Let a `JetMoeMoA` count and multiply without the host, or return why not."""
    why = unknown_code(module, {"map": "cc1ec4b46455", "reduce": "7a0c4b7cb34d"}) or _parts(module)
    if why is None:
        _replace_parts(module)
    return why


def _parts(module: Any) -> Refusal | None:
    return unknown_code(module.router, {"forward": "d6099568edab"}) or unknown_code(
        module.input_linear, {"forward": "51818b768cab"}
    )


def _replace_parts(module: Any) -> None:
    put(module.router, _routed)
    for linear in (module.input_linear, module.output_linear):
        put(linear, _grouped)


def _run(self: Any, layer_input: Tensor) -> Tensor:
    batch, length, width = layer_input.shape
    x = layer_input.reshape(-1, width)
    logits = self.router(x)[4]
    chosen, ids = logits.topk(self.router.top_k, dim=1)
    weights = torch.softmax(chosen, dim=1).type_as(x)
    y = moe(x, ids, weights, self.input_linear.weight, self.output_linear.weight, self._eff_gate)
    return y.view(batch, length, self.input_size) + self.bias


def _routed(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Any, Tensor]:
    """Route as `JetMoeTopKGating` does; the fourth result, tokens an expert, stays a tensor where no gradient is wanted."""
    if aside(self, hidden_states):
        made: tuple[Tensor, Tensor, Tensor, Any, Tensor] = type(self).forward(self, hidden_states)
        return made
    logits = self.layer(hidden_states).float()
    chosen, ids = logits.topk(self.top_k, dim=1)
    gates = torch.softmax(chosen, dim=1).type_as(hidden_states)
    flat = ids.flatten()
    counts = flat.new_zeros(self.num_experts).scatter_add(0, flat, torch.ones_like(flat))
    _, order = flat.sort(0)
    return order, order.div(self.top_k, rounding_mode="trunc"), gates.flatten()[order], counts, logits


def _grouped(self: Any, inputs: Tensor, expert_size: Any) -> Tensor:
    """Multiply sorted rows by the weights of their experts `[E, out, in]`."""
    if not isinstance(expert_size, Tensor):
        made: Tensor = type(self).forward(self, inputs, expert_size)
        return made
    offsets = expert_size.cumsum(0).to(torch.int32)
    # transformers' op has a gradient, so it serves a module whose router alone is frozen too.
    found: Tensor = torch.ops.transformers.grouped_mm_fallback(inputs, self.weight.transpose(-2, -1), offsets)
    return found
