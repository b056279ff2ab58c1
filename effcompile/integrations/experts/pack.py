"""Lay the weights of separate parameters side by side as operands of `eff::moe_v1`, and make the parameters views of that.

So nothing is stored twice, names and shapes of parameters stay, and what is written into them in place (`load_state_dict`, an
optimizer) is seen at once. A parameter that moves elsewhere (`model.to`, `load_state_dict(assign=True)`, an adapter in place of a
layer) makes the pack stale: torch tells of registrations, which also reaches compiled code, and eager calls compare addresses.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from effcompile.core.site import Refusal

MARK = "_eff_pack"
OPERANDS = ("w1", "b1", "w2", "b2")


@dataclass(frozen=True)
class Part:
    """Place a parameter of `owner` into an operand: `cut` returns its view of the whole."""

    owner: nn.Module
    name: str
    parameter: nn.Parameter
    operand: str
    cut: Callable[[Tensor], Tensor]


class Pack:
    """Hold operands of `eff::moe_v1` that the parameters of a module are views of. Operands without a shape are None."""

    def __init__(self, parts: Sequence[Part], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.parts, self.shapes = tuple(parts), dict(shapes)
        self.ready = False
        # Parameters, not buffers: Dynamo keeps the sizes of a parameter static, wherever it lies.
        self.w1: nn.Parameter | None = None
        self.b1: nn.Parameter | None = None
        self.w2: nn.Parameter | None = None
        self.b2: nn.Parameter | None = None

    def fill(self) -> Refusal | None:
        """Copy the parameters side by side and make them views, or return why not."""
        self.ready = False
        tensors = [part.parameter for part in self.parts]
        kinds = {(t.dtype, t.device) for t in tensors}
        if any(type(t) is not nn.Parameter for t in tensors) or len(kinds) != 1 or not tensors[0].is_floating_point():
            return Refusal("EFF-M302", "the weights of the experts differ in dtype or device, or are quantized")
        if tensors[0].is_meta:
            return Refusal("EFF-M302", "the weights of the experts are on the meta device", "load them first")
        if len({id(t) for t in tensors}) < len(tensors):
            return Refusal("EFF-M302", "experts share a parameter")
        ((dtype, device),) = kinds
        for operand, shape in self.shapes.items():
            whole = torch.empty(shape, dtype=dtype, device=device)
            for part in self.parts:
                if part.operand != operand:
                    continue
                view = part.cut(whole)
                if view.shape != part.parameter.shape:
                    return Refusal(
                        "EFF-M302", f"`{part.name}` is {list(part.parameter.shape)}, {list(view.shape)} expected"
                    )
                view.copy_(part.parameter.detach())
                part.parameter.data = view
            setattr(self, operand, nn.Parameter(whole, requires_grad=False))
        self.ready = True
        return None

    def fresh(self) -> bool:
        """Tell whether all parameters are still views of the operands; asks addresses, so not in traced code."""
        if not self.ready or isinstance(self.w1, FakeTensor):
            return self.ready
        wholes = {operand: getattr(self, operand) for operand in self.shapes}
        self.ready = all(
            part.owner._parameters.get(part.name) is part.parameter
            and part.parameter.data_ptr() == part.cut(wholes[part.operand]).data_ptr()
            for part in self.parts
        )
        return self.ready

    def mark(self, modules: Iterable[nn.Module]) -> None:
        """Be told when a parameter or a child of one of some modules is replaced."""
        _watch()
        for module in modules:
            module.__dict__[MARK] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Pack:
        """Return a pack of the copied module, whose parameters are views of copied operands."""
        made = Pack((), self.shapes)
        memo[id(self)] = made
        made.parts = tuple(
            replace(part, owner=copy.deepcopy(part.owner, memo), parameter=copy.deepcopy(part.parameter, memo))
            for part in self.parts
        )
        made.ready = self.fresh()
        for operand in self.shapes:
            whole = getattr(self, operand)
            if whole is None:
                continue
            # Of a plain tensor, so that a copy without data (skeleton.py) is asked too.
            copied = copy.deepcopy(whole.detach(), memo)
            setattr(made, operand, nn.Parameter(copied, requires_grad=False))
            for part in made.parts if made.ready and not isinstance(copied, FakeTensor) else ():
                if part.operand == operand:
                    part.parameter.data = part.cut(copied)
        return made


@functools.cache
def _watch() -> None:
    register_module_parameter_registration_hook(_noticed)
    register_module_module_registration_hook(_noticed)


def _noticed(module: nn.Module, name: str, value: Any) -> None:
    pack = module.__dict__.get(MARK)
    if pack is not None and value is not (
        module._parameters.get(name) if isinstance(value, Tensor) else module._modules.get(name)
    ):
        pack.ready = False
