"""Replace the loop over LongCat-Flash's experts, of which the last ones give a token back as it came.

To `eff::moe_v1` the id of such an expert is one outside, which contributes nothing; what it contributes is the token times the
weights of its slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effcompile.core.experts import Gate
from effcompile.core.site import Refusal
from effcompile.integrations.experts.attach import attach, moe
from effcompile.integrations.experts.mlp import activation
from effcompile.integrations.experts.source import unknown_code

CLASS = "LongcatFlashExperts"


def prepare(module: Any) -> Refusal | None:
    """Let a `LongcatFlashExperts` run through one op, or return why not."""
    why = unknown_code(module, {"forward": "bb48de276c98"})
    if why is not None:
        return why
    if module.gate_up_proj is None:
        return Refusal("EFF-M302", f"{CLASS} has no experts that compute")
    act = activation(module.act_fn)
    if isinstance(act, Refusal):
        return act
    module.__dict__["_eff_gate"] = Gate(act)
    attach(module, _run)
    return None


def _run(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    real = self.num_routed_experts
    first = self.gate_up_proj[:real]
    routed = moe(hidden_states, top_k_index, top_k_weights, first, self.down_proj, self._eff_gate)
    idle = torch.where(top_k_index >= real, top_k_weights, 0.0).sum(1, keepdim=True)
    return routed + (hidden_states * idle).to(hidden_states.dtype)
