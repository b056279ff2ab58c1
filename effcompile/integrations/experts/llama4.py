"""Replace Llama 4's block: a token is multiplied by the sigmoid of its score before its experts see it.

The source runs every expert on every token, times 0 where the expert was not chosen. An expert without biases gives 0 of 0, so only
the chosen ones have to run. The router gives the scores of all experts, 0 outside its top-k; the k largest are those that it chose,
or 0 as well.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from effcompile.core.experts import Gate
from effcompile.core.site import Refusal
from effcompile.integrations.experts.attach import attach, moe
from effcompile.integrations.experts.mlp import activation
from effcompile.integrations.experts.source import unknown_code

CLASS = "Llama4TextMoe"


def prepare(module: Any) -> Refusal | None:
    """Let a `Llama4TextMoe` run its experts through one op, or return why not."""
    why = unknown_code(module, {"forward": "dc887c7c67be"})
    why = why or unknown_code(module.router, {"forward": "60d46ff501b5"})
    why = why or unknown_code(module.experts, {"forward": "83bce27f33c9"})
    if why is not None:
        return why
    act = activation(module.experts.act_fn)
    if isinstance(act, Refusal):
        return act
    module.__dict__["_eff_gate"] = Gate(act)
    attach(module, _run)
    return None


def _run(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(x)
    weights, ids = scores.topk(self.top_k, dim=1)
    held: nn.Module = self.experts
    routed = moe(x, ids, weights, held.gate_up_proj, held.down_proj, self._eff_gate, transposed=True, side="in")
    return self.shared_expert(x) + routed, logits
