"""Replace a block that loops over a list of experts, each a module of its own, as most code before transformers 5 does."""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn

from effcompile.core.experts import Gate
from effcompile.core.site import Refusal
from effcompile.integrations.experts.attach import attach, attach_packed, moe
from effcompile.integrations.experts.loops import CALL, loop_of, without_loop
from effcompile.integrations.experts.mlp import alike, pack_experts, read_expert
from effcompile.integrations.experts.pack import Pack

CONTAINER = "experts"


def has_list(module: nn.Module) -> bool:
    """Tell whether a module keeps its experts in a list."""
    return isinstance(getattr(module, CONTAINER, None), nn.ModuleList)


def prepare(module: nn.Module) -> Refusal | None:
    """Let a block run its experts through one op, or return why not."""
    kind = type(module).__name__
    source = loop_of(type(module))
    if source is None:
        return Refusal("EFF-M302", f"{kind} has no method, or several, that add up experts in a loop (`index_add_`)")
    method, function = source
    rewritten = without_loop(module, method, function, CONTAINER)
    if isinstance(rewritten, Refusal):
        return rewritten
    gate = pack(module, list(getattr(module, CONTAINER)))
    if isinstance(gate, Refusal):
        return gate
    module.__dict__[CALL] = types.MethodType(_run, module)
    attach(module, rewritten, method)
    return None


def pack(module: nn.Module, experts: list[nn.Module]) -> Gate | Refusal:
    """Lay the weights of a module's experts side by side and keep them with the module; return their gate."""
    read = read_expert(experts[0])
    if isinstance(read, Refusal):
        return read
    why = alike(experts)
    if why is not None:
        return why
    made = pack_experts(experts, read)
    why = made.fill()
    if why is not None:
        return why
    module.__dict__["_eff_gate"] = read.gate
    made.mark([module, *(inner for expert in experts for inner in expert.modules())])
    listed = getattr(module, CONTAINER, None)
    if isinstance(listed, nn.Module):
        made.mark([listed])
    attach_packed(module, made, lambda owner: _repacked(owner))
    return read.gate


def _repacked(module: nn.Module) -> Refusal | None:
    listed: Any = getattr(module, CONTAINER, module)
    found = pack(module, list(listed.children()))
    return found if isinstance(found, Refusal) else None


def _run(self: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    held: Pack = self._eff_pack
    assert held.w1 is not None
    assert held.w2 is not None
    return moe(x, ids, weights, held.w1, held.w2, self._eff_gate, b1=held.b1, b2=held.b2)
