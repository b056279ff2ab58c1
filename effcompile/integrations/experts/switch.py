"""Replace the loop over Switch Transformers' experts: one expert a token, and none where that expert is full.

The router is the source's own and says by a one-hot row which expert a token goes to; the row of a token that was dropped is empty,
and such a token gets 0. To `eff::moe_v1` it has an id outside. Paper: arXiv:2101.03961.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effcompile.core.site import Refusal
from effcompile.integrations.experts.attach import attach, moe
from effcompile.integrations.experts.listed import pack
from effcompile.integrations.experts.source import unknown_code

CLASS = "SwitchTransformersSparseMLP"


def prepare(module: Any) -> Refusal | None:
    """Let the experts of a `SwitchTransformersSparseMLP` run through one op, or return why not."""
    why = unknown_code(module, {"forward": "637c6c1c5f65"})
    why = why or unknown_code(module.router, {"forward": "67e420a5dbae"})
    why = why or unknown_code(module.experts, {"forward": "cba2095fe1c4"})
    if why is not None:
        return why
    gate = pack(module.experts, list(module.experts.values()))
    if isinstance(gate, Refusal):
        return gate
    attach(module.experts, _run)
    return None


def _run(self: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
    taken = selected_experts[:, 0].to(torch.bool)  # [T, E]
    ids = torch.where(taken.any(1), taken.to(torch.uint8).argmax(1), self.num_experts)[:, None]
    held = self._eff_pack
    return moe(hidden_states, ids, routing_weights, held.w1, held.w2, self._eff_gate)
