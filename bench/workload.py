"""Hold what every arm of a row runs: one module, one call, and the part of the output that is compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[..., Any]


def _nothing() -> None:
    return None


def _whole(output: Tensor) -> Tensor:
    return output


@dataclass(frozen=True)
class Bound:
    """Hold a timed call and what has to happen, untimed, before it can be made again."""

    call: Callable[[], Any]
    rewind: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Workload:
    """Describe one call of one module.

    Attributes:
        module: in eval mode, in `dtype`, on `device`. All torch arms share it, so that weights exist once.
        args, kwargs: of the call.
        dtype: of the weights.
        device: `cpu` or `cuda`.
        select: takes the primary output and returns what is compared (real positions, a sample of rows).
        export_kwargs: replaces `kwargs` for ONNX, which has no cache objects.
        no_export: why the module has no fixed ONNX graph, or ''.
        steps: units (tokens) in one timed call; reported seconds are per unit.
        notes: what a reader of the row must know.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dtype: torch.dtype
    device: str = "cpu"
    select: Callable[[Tensor], Tensor] = _whole
    export_kwargs: Mapping[str, Any] | None = None
    no_export: str = ""
    steps: int = 1
    notes: tuple[str, ...] = field(default=())

    def bind(self, function: Function, dtype: torch.dtype) -> Bound:
        """Return the timed call of `function`, the module or something compiled from it, with inputs in `dtype`."""
        args, kwargs = cast(self.args, dtype), cast(dict(self.kwargs), dtype)
        return Bound(lambda: function(*args, **kwargs))

    def twin(self, dtype: torch.dtype) -> nn.Module:
        """Return a copy of the module with the same weights in another dtype, or the module itself in its own."""
        return self.module if dtype == self.dtype else copy.deepcopy(self.module).to(dtype)

    def flat(self, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the module as one from tensors to its primary output, and those tensors by name."""
        kwargs = dict(self.kwargs if self.export_kwargs is None else self.export_kwargs)
        names = [f"input{place}" for place in range(len(self.args))]
        tensors = dict(zip(names, self.args)) | {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
        fixed = {key: value for key, value in kwargs.items() if not isinstance(value, Tensor)}
        return Flat(self.twin(dtype), len(names), tuple(tensors)[len(names) :], fixed), cast(tensors, dtype)


class Flat(nn.Module):  # type: ignore[misc]  # torch is Any here
    """Call a module with positional tensors and return its primary output."""

    def __init__(self, module: nn.Module, positional: int, names: tuple[str, ...], fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.module, self.positional, self.names, self.fixed = module, positional, names, dict(fixed)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Run the module on its positional tensors, then the named ones."""
        named = dict(zip(self.names, tensors[self.positional :]))
        return primary(self.module(*tensors[: self.positional], **named, **self.fixed))


def primary(output: Any) -> Tensor:
    """Return the tensor that a model is run for: logits, the last hidden state, or the first output."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state", "sample"):
        value = getattr(output, name, None)
        if value is not None:
            return value
    first: Any = output[0]
    return primary(first)


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Return the value, or the tuple or dict of values, with floating tensors in `dtype`."""
    if isinstance(values, dict):
        return {key: cast(value, dtype) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(cast(value, dtype) for value in values)
    return values.to(dtype) if isinstance(values, Tensor) and values.is_floating_point() else values


def place(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: str) -> tuple[Any, Any, Any]:
    """Return module, args and kwargs on a device."""
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in kwargs.items()}
    return module.to(device), tuple(v.to(device) if isinstance(v, Tensor) else v for v in args), moved
