"""Copy a model and its inputs without their data: right shapes, strides, dtypes and structure, no weights read.

A dry run traces the copy, so that a 70-billion-parameter model is explained in the memory of its Python objects. The
copies are torch's fake tensors on an ordinary device, not meta tensors: a model sees the device that it expects, and
Dynamo handles both worlds, where tensors that a model makes on the meta device confuse it (`torch.tensor([],
device="meta")` is one).

The content of buffers is the exception that matters (nanoGPT keeps its causal mask in one), so the copy remembers where
each buffer came from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from effcompile.core.errors import EffError

_ON_WEIGHTS = "explain it with its weights: eff.explain(..., real=True), or eff explain MODEL --real"


@dataclass(frozen=True)
class Skeleton:
    """Hold a model and a maker of fresh arguments for one call, both fake or both real.

    `origins` maps `id(fake tensor)` to the buffer, or other tensor of the model, whose content it stands for; `mode` is active
    while the model runs.
    """

    model: Callable[..., Any]
    inputs: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    origins: Mapping[int, torch.Tensor] = field(default_factory=dict)
    mode: Any = None

    def running(self) -> AbstractContextManager[Any]:
        """Return the context in which the model runs: without gradients, and fake where its weights are."""
        return self.mode if self.mode is not None else nullcontext()


def real(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Skeleton:
    """Return the model as it is; its arguments are copied for every run, since a KV cache among them is written to."""
    return Skeleton(model, lambda: copy.deepcopy((tuple(args), dict(kwargs))))


def strip(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: str = "cpu") -> Skeleton:
    """Return copies of a module and its arguments with every tensor fake, on `device` (which need not exist here).

    Raises `EFF-G310` for a model that Python cannot copy or that holds tensors of another layout or class.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # constants that live in closures stay real
    faker = _Faker(mode, torch.device(device))
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = faker.parameter(parameter)
    origins: dict[int, torch.Tensor] = {}
    for buffer in model.buffers():
        memo[id(buffer)] = faker.empty(buffer.detach())
        origins[id(memo[id(buffer)])] = buffer
    given = (tuple(args), dict(kwargs))
    return Skeleton(_copied(model, memo, faker, origins), lambda: _copied(given, {}, faker, {}), origins, mode)


@dataclass
class _Faker:
    mode: FakeTensorMode
    device: torch.device

    def empty(self, tensor: torch.Tensor) -> torch.Tensor:
        plain = type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer, FakeTensor)
        if tensor.layout is not torch.strided or not plain:
            name = f"{type(tensor).__name__} ({tensor.layout})"
            raise EffError("EFF-G310", f"a {name} cannot be copied without its data", hint=_ON_WEIGHTS)
        with self.mode:
            made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=self.device)
        return made.requires_grad_(tensor.requires_grad) if tensor.is_leaf else made

    def parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        made = self.empty(parameter.detach())
        with self.mode:
            return nn.Parameter(made, requires_grad=parameter.requires_grad)


@dataclass
class _DeepCopyFake(TorchFunctionMode):
    """Answer `copy.deepcopy(tensor)` with a fake tensor, and note what it stands for; leave every other call alone."""

    faker: _Faker
    origins: dict[int, torch.Tensor]

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = made = self.faker.empty(tensor)
                self.origins[id(made)] = tensor
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _copied(value: Any, memo: dict[int, Any], faker: _Faker, origins: dict[int, torch.Tensor]) -> Any:
    try:
        with _DeepCopyFake(faker, origins):
            return copy.deepcopy(value, memo)
    except EffError:
        raise
    except Exception as error:
        what = f"cannot copy a {type(value).__name__} without its data: {type(error).__name__}: {error}"
        raise EffError("EFF-G310", what, hint=_ON_WEIGHTS) from error


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put every parameter that a module registers inside this context on the meta device; buffers keep their content.

    Building under `torch.device("meta")` would lose the buffers too, and with them the masks that some models keep
    there.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()
