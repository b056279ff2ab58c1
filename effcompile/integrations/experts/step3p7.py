"""Replace the loop over Step 3.7's experts, which are stacked already."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from effcompile.core.experts import Gate
from effcompile.core.site import Refusal
from effcompile.integrations.experts.attach import attach, moe
from effcompile.integrations.experts.mlp import activation
from effcompile.integrations.experts.source import unknown_code

CLASS = "Step3p7Experts"


def prepare(module: Any) -> Refusal | None:
    """Let a `Step3p7Experts` run through one op, or return why not."""
    why = unknown_code(module, {"forward": "4c6fc8854400", "_apply_gate": "d8843ea7e313"})
    if why is not None:
        return why
    if not math.isinf(module.limit):
        return Refusal(
            "EFF-M302", f"{CLASS} limits the gate to {module.limit:g} behind its activation, `eff::moe_v1` before it"
        )
    act = activation(module.act_fn)
    if isinstance(act, Refusal):
        return act
    module.__dict__["_eff_gate"] = Gate(act)
    attach(module, _run)
    return None


def _run(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return moe(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj, self._eff_gate)
