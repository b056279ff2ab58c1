"""Give the experts of transformers models to `eff::moe_v1`, in plain calls and in compiled code.

transformers 5 lets a model's experts run through a function of a registry. Ours reads the layout of the weights from the module
and calls the op. What the module does between the two products is read once, by tracing it, with the reader that recognizes
graphs: a gate that cannot be read, a norm behind the experts, and training keep transformers' own grouped products. Classes
outside the registry get a forward of their own (experts/catalog.py); what nothing knows is named and left alone.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from effcompile import ops
from effcompile.core.errors import EffError
from effcompile.core.site import Refusal
from effcompile.integrations.experts.attach import ExpertsWarning, untouchable
from effcompile.integrations.experts.catalog import replacement
from effcompile.modules import expert_modules
from effcompile.ops import native
from effcompile.passes.recognize.gates import read_gate

INTERFACE = "eff"


def experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the experts of a module as transformers' interface says: tokens `[T, H]`, ids and weights `[T, k]`; returns `[T, H]`."""
    gate = getattr(self, "_eff_gate", None)
    first = self.gate_up_proj if self.has_gate else self.up_proj
    trained = torch.is_grad_enabled() and (
        hidden_states.requires_grad or first.requires_grad or top_k_weights.requires_grad
    )
    # Off the CPU the op reads counts on the host unless a plan puts another dispatch in its place.
    plain = hidden_states.device.type != "cpu" and not torch.compiler.is_compiling()
    if gate is None or trained or plain or hidden_states.dtype != first.dtype:
        from transformers.integrations.moe import grouped_mm_experts_forward

        found: Tensor = grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return found
    name = "gate_up_proj_bias" if self.has_gate else "up_proj_bias"
    b1, b2 = (getattr(self, name), self.down_proj_bias) if self.has_bias else (None, None)
    act, layout, alpha, beta, limit = gate
    made: Tensor = torch.ops.eff.moe_v1(
        hidden_states,
        top_k_index,
        top_k_weights,
        first,
        b1,
        self.down_proj,
        b2,
        act,
        layout,
        self.is_transposed,
        "out",
        alpha,
        beta,
        limit,
    )
    return made


def prepare_experts(model: nn.Module) -> tuple[tuple[str, Refusal], ...]:
    """Let a model's experts run through `eff::moe_v1`; return (path, reason) of those that do not, each of which is warned of once.

    Only attributes of modules change: names, shapes and values of weights stay.
    """
    kept: list[tuple[str, Refusal]] = []
    known = [(path, module, how) for path, module in model.named_modules() if (how := replacement(module)) is not None]
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for path, module, how in known:
        if (why := untouchable(module, uses) or how(module)) is not None:
            kept.append((path, why))
    inside = {id(part) for _, module, _ in known for part in module.modules()}
    left = [(path, module) for path, module in expert_modules(model) if id(module) not in inside]
    for path, module in left:
        if (why := _ready(module)) is not None:
            kept.append((path, why))
    ready = [module for _, module in left if getattr(module, "_eff_gate", None) is not None]
    if ready:
        _switch(model, ready)
    told: dict[str, str] = {}
    for path, why in kept:
        told.setdefault(str(why), path)
    for text, path in told.items():
        warnings.warn(f"effcompile: `{path}`: {text}", ExpertsWarning, stacklevel=3)
    return tuple(kept)


def _ready(module: nn.Module) -> Refusal | None:
    """Read the gate of an experts module into it, or return why its experts stay as they are."""
    kind = type(module).__name__
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj")):
        return Refusal(
            "EFF-M302",
            f"{kind} is neither one of transformers' experts interface nor a block that effcompile knows (docs/experts.md)",
        )
    if getattr(module, "has_post_expert_norm", False):
        return Refusal("EFF-M302", f"{kind} has a norm behind each expert")
    first = module.gate_up_proj if module.has_gate else module.up_proj
    if not isinstance(first, Tensor) or first.dim() != 3 or not first.is_floating_point():
        return Refusal("EFF-M302", f"the weights of {kind} are quantized or packed")
    function = module._apply_gate if module.has_gate else module.act_fn
    wide = first.shape[2 if module.is_transposed else 1]
    try:
        traced = make_fx(lambda h: function(h), tracing_mode="fake", pre_dispatch=True)(torch.empty(2, wide))
        (result,) = next(node for node in traced.graph.nodes if node.op == "output").args
        read = read_gate(result)
    except Exception as error:  # a module's own code: whatever it raises, its experts stay as they are
        return Refusal("EFF-M302", f"the gate of {kind} cannot be traced ({type(error).__name__})")
    if isinstance(read, Refusal):
        return Refusal("EFF-M302", f"{kind}: {read.reason}")
    gate = read.gate
    if read.source.op != "placeholder" or (gate.layout != "none") != bool(module.has_gate):
        return Refusal("EFF-M302", f"the gate of {kind} reads something else than the first product")
    module._eff_gate = (gate.act, gate.layout, gate.alpha, gate.beta, gate.limit)
    return None


def _switch(model: nn.Module, modules: list[nn.Module]) -> None:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise EffError(
            "EFF-U104", "this transformers has no registry of experts", hint="pip install 'transformers>=5'"
        ) from error
    ops.register()
    ALL_EXPERTS_FUNCTIONS.register(INTERFACE, experts)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(INTERFACE)
    for module in modules:
        module.config._experts_implementation = (
            INTERFACE  # of a part of a model, or a part with a configuration of its own
        )
    if any(parameter.device.type == "cpu" for module in modules for parameter in module.parameters()):
        native.prefetch((native.EXPERTS,))
