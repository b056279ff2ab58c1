"""Replace the loop over DBRX's experts, whose weights lie in three tall matrices `[E I, H]`.

Gate and up become views of one operand in which their rows take turns (`interleaved`); the down matrices are read as they lie,
`[E, I, H]`. A `state_dict` gets contiguous copies of the two, since file formats take no strided tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from effcompile.core.experts import Gate
from effcompile.core.site import Refusal
from effcompile.integrations.experts.attach import attach, attach_packed, moe
from effcompile.integrations.experts.mlp import activation
from effcompile.integrations.experts.pack import Pack, Part
from effcompile.integrations.experts.source import unknown_code

CLASS = "DbrxExperts"


def prepare(module: Any) -> Refusal | None:
    """Let a `DbrxExperts` run through one op, or return why not."""
    why = unknown_code(module, {"forward": "8cc81feaae27"})
    why = why or unknown_code(module.mlp, {"forward": "a76a30668211"})
    if why is not None:
        return why
    act = activation(module.mlp.activation_fn)
    if isinstance(act, Refusal):
        return act
    why = _pack(module)
    if why is not None:
        return why
    module.__dict__["_eff_gate"] = Gate(act, "interleaved")
    if "forward" not in vars(module):  # not prepared before
        module.mlp.register_state_dict_post_hook(_dense)
    attach(module, _run)
    return None


def _pack(module: Any) -> Refusal | None:
    mlp, height = module.mlp, module.num_experts * module.ffn_hidden_size

    def half(which: int) -> Callable[[Tensor], Tensor]:
        return lambda whole: whole.view(height, 2, -1)[:, which]

    parts = [Part(mlp, name, mlp._parameters[name], "w1", half(n)) for n, name in enumerate(("w1", "v1"))]
    pack = Pack(parts, {"w1": (module.num_experts, 2 * module.ffn_hidden_size, module.hidden_size)})
    why = pack.fill()
    if why is None:
        pack.mark([module, mlp])
        attach_packed(module, pack, _pack)
    return why


def _run(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    x = hidden_states.reshape(-1, self.hidden_size)
    second = self.mlp.w2.view(self.num_experts, self.ffn_hidden_size, self.hidden_size).transpose(1, 2)
    y = moe(x, top_k_index, top_k_weights, self._eff_pack.w1, second, self._eff_gate)
    return y.view(hidden_states.shape[0], -1, self.hidden_size)


def _dense(mlp: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in ("w1", "v1"):
        value = state[prefix + name]
        if not isinstance(value, nn.Parameter):  # keep_vars asks for the parameter itself
            state[prefix + name] = value.contiguous()
