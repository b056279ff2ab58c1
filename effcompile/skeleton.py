"""Copy a model and its inputs onto the meta device: right shapes, strides and structure, no weights read.

A dry run traces the copy, so that a 70-billion-parameter model is explained in the memory of its Python objects. The content of
buffers is the exception that matters (nanoGPT keeps its causal mask in one), so the copy remembers where each buffer came from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from effcompile.core.errors import EffError

META = torch.device("meta")


@dataclass(frozen=True)
class Skeleton:
    """Hold a model on the meta device; `origins` maps `id(copied buffer)` to the buffer whose content it stands for."""

    model: Callable[..., Any]
    origins: Mapping[int, torch.Tensor] = field(default_factory=dict)


class _DeepCopyOnMeta(TorchFunctionMode):
    """Answer `copy.deepcopy(tensor)` with an empty tensor on the meta device; leave every other call alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = _empty_like(tensor)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout is not torch.strided or type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
        raise EffError(
            "EFF-G310",
            f"a {type(tensor).__name__} ({tensor.layout}) has no counterpart on the meta device",
            hint="explain it with its weights: eff.explain(..., real=True), or eff explain MODEL --real",
        )
    made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)
    return made.requires_grad_(tensor.requires_grad) if tensor.is_leaf else made


def strip(model: nn.Module) -> Skeleton:
    """Return a copy of `model` on the meta device; a model without any data is returned as it is.

    Raises `EFF-G310` for a model that Python cannot copy or that holds tensors without a meta counterpart.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if all(tensor.is_meta for tensor in tensors):
        return Skeleton(model)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_empty_like(parameter.detach()), requires_grad=parameter.requires_grad)
    origins: dict[int, torch.Tensor] = {}
    for buffer in model.buffers():
        memo[id(buffer)] = _empty_like(buffer.detach())
        origins[id(memo[id(buffer)])] = buffer
    return Skeleton(_copied(model, memo), origins)


def strip_inputs(values: Any) -> Any:
    """Return a copy of arguments (tensors, caches, any nesting) with every tensor on the meta device."""
    return _copied(values, {})


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        with _DeepCopyOnMeta():
            return copy.deepcopy(value, memo)
    except EffError:
        raise
    except Exception as error:
        raise EffError(
            "EFF-G310",
            f"cannot copy a {type(value).__name__} onto the meta device: {type(error).__name__}: {error}",
            hint="build it under torch.device('meta'), or explain it with its weights: real=True (--real)",
        ) from error


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put every parameter that a module registers inside this context on the meta device; buffers keep their content.

    Building under `torch.device("meta")` would lose the buffers too, and with them the masks that some models keep there.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(_empty_like(parameter.detach()), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()
