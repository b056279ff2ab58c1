"""Put a replacement into one module, and decide at each call whether it runs or the module's own code.

Only attributes of the instance change: the class, its parameters and their names stay. A copy of the module is replaced as well.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effcompile import ops
from effcompile.core.experts import Gate
from effcompile.core.site import Refusal
from effcompile.integrations.experts.pack import MARK, Pack
from effcompile.ops import native

Again = Callable[[nn.Module], Refusal | None]
"""Prepares a module anew after its weights went elsewhere."""


class ExpertsWarning(UserWarning):
    """Tell that the experts of a class stay as they are."""


def untouchable(module: nn.Module, uses: Mapping[int, int]) -> Refusal | None:
    """Return why a module cannot be replaced, whatever its class; `uses` counts the places of a parameter in a model, by its id."""
    kind = type(module).__name__
    for part in module.modules():
        if "forward" in vars(part) and "_eff_method" not in vars(part):
            return Refusal("EFF-M302", f"the forward of {type(part).__name__} was replaced by something else already")
    for parameter in module.parameters():
        if type(parameter) is not nn.Parameter:
            return Refusal(
                "EFF-M302", f"the weights of {kind} are quantized or distributed ({type(parameter).__name__})"
            )
        if uses.get(id(parameter), 1) > 1:
            return Refusal("EFF-M302", f"{kind} shares a weight with another place of the model")
    return None


def attach(
    module: nn.Module, run: Callable[..., Any], method: str = "forward", fits: Callable[..., bool] | None = None
) -> None:
    """Let `module.method(...)` call `run(module, ...)` where it can.

    It cannot in training, under autocast, where a gradient is wanted, where `fits(module, ...)` is false, or where the pack of the
    module is stale and cannot be made again.
    """
    own = getattr(type(module), method)

    def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        stands = not aside(self, *args) and (fits is None or fits(self, *args, **kwargs))
        if stands and _packed(self):
            return run(self, *args, **kwargs)
        return own(self, *args, **kwargs)

    ops.register()
    put(module, replaced, method)
    if any(parameter.device.type == "cpu" for parameter in module.parameters()):
        native.prefetch((native.EXPERTS,))


def put(module: nn.Module, function: Callable[..., Any], method: str = "forward") -> None:
    """Let `module.method(...)` call `function(module, ...)`."""
    module.__dict__[method] = types.MethodType(function, module)
    module.__dict__["_eff_method"] = method


def attach_packed(module: nn.Module, pack: Pack, again: Again) -> None:
    """Keep a pack with its module: made again behind whatever moves or replaces parameters."""

    def apply(self: Any, function: Any, recurse: bool = True) -> Any:
        found = type(self)._apply(self, function, recurse)
        _again(self)
        return found

    first = "_eff_again" not in module.__dict__
    module.__dict__["_eff_again"] = again
    module.__dict__["_apply"] = types.MethodType(apply, module)
    if first:
        module.register_load_state_dict_post_hook(_loaded)


def detach(module: nn.Module) -> None:
    """Give a module its own code back; its weights stay where they are."""
    for name in (module.__dict__.get("_eff_method", "forward"), "_apply", "_eff_again", "_eff_method"):
        module.__dict__.pop(name, None)
    for child in module.modules():
        child.__dict__.pop(MARK, None)


def aside(module: nn.Module, *operands: Any) -> bool:
    """Tell whether a module's own code has to run: in training, under autocast, and where gradients flow."""
    tensors = [value for value in operands if isinstance(value, Tensor)]
    if module.training or any(torch.is_autocast_enabled(value.device.type) for value in tensors):
        return True
    if not torch.is_grad_enabled():
        return False
    return any(value.requires_grad for value in tensors) or any(p.requires_grad for p in module.parameters())


def moe(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    gate: Gate,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    transposed: bool = False,
    side: str = "out",
) -> Tensor:
    """Call `eff::moe_v1`: x `[T, H]`, ids and weights `[T, k]`; returns `[T, H]`."""
    numbers = (gate.alpha, gate.beta, gate.limit)
    made: Tensor = torch.ops.eff.moe_v1(
        x, ids, weights, w1, b1, w2, b2, gate.act, gate.layout, transposed, side, *numbers
    )
    return made


def _packed(module: Any) -> bool:
    """Tell whether the operands of a module are what its parameters say; make them again where an eager call can."""
    pack: Pack | None = getattr(module, MARK, None)
    if pack is None:
        return True
    if torch.compiler.is_compiling():
        return pack.ready
    return pack.fresh() or _again(module)


def _again(module: nn.Module) -> bool:
    why = module.__dict__["_eff_again"](module)
    if why is not None:
        detach(module)
        warnings.warn(
            f"effcompile: the experts of a {type(module).__name__} run as they were written again: {why}",
            ExpertsWarning,
            stacklevel=4,
        )
    return why is None


def _loaded(module: nn.Module, keys: Any) -> None:
    if module.__dict__.get("_eff_again") is not None and not module.__dict__[MARK].fresh():
        _again(module)
