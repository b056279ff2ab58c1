"""Run an engine of TensorRT-RTX, or of TensorRT, on the GPU that is here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effcompile.core.artifact import TensorInfo
from effcompile.core.emitter import check_inputs
from effcompile.core.errors import EffError


def chip_here() -> str:
    """Return the compute word of the GPU that is here, or raise EFF-E165."""
    if not torch.cuda.is_available():
        raise EffError(
            "EFF-E165",
            "an engine runs on its GPU, and torch sees none here",
            hint="--provider cpu runs the ONNX beside it",
        )
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


class EngineSession:
    """Hold a loaded engine; calls take tensors of any device and give CPU tensors."""

    def __init__(
        self, path: Path, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], module: str = "tensorrt_rtx"
    ) -> None:
        try:
            trt: Any = importlib.import_module(module)
        except ImportError as error:
            raise EffError("EFF-E112", f"{module} is not installed: {error}", hint=f"pip install {module}") from None
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EffError(
                "EFF-E164",
                f"{module} does not load {path.name}: it is damaged, or of another version",
                hint=f"eff show DIR has the version of {module} that built it",
            )
        self._context = self._engine.create_execution_context()
        self._profile = 0
        self.inputs: tuple[str, ...] = tuple(x.name for x in inputs)
        self.outputs: tuple[str, ...] = tuple(x.name for x in outputs)
        self._kinds = {x.name: getattr(torch, x.dtype) for x in outputs if hasattr(torch, x.dtype)}

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return every output by its name; raises EFF-E111 for other inputs, and for sizes outside of the engine's."""
        check_inputs(self.inputs, given)
        kept = {name: x.to("cuda").contiguous() for name, x in given.items()}
        stream = torch.cuda.current_stream()
        self._choose({name: tuple(x.shape) for name, x in kept.items()}, stream)
        for name, x in kept.items():
            if not self._context.set_input_shape(name, tuple(x.shape)):
                raise EffError(
                    "EFF-E111",
                    f"`{name}` of {tuple(x.shape)} is outside of the engine's sizes",
                    hint="--profile INPUT.DIM=MIN:OPT:MAX sets them at export",
                )
            self._context.set_tensor_address(name, x.data_ptr())
        found = {}
        for name in self.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            found[name] = torch.empty(shape, dtype=self._kinds.get(name, torch.float32), device="cuda")
            self._context.set_tensor_address(name, found[name].data_ptr())
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise EffError("EFF-E111", "the engine fails", hint="--provider cpu runs the ONNX beside it")
        stream.synchronize()
        return {name: x.cpu() for name, x in found.items()}

    def _choose(self, shapes: Mapping[str, tuple[int, ...]], stream: Any) -> None:
        """Take the first optimization profile that all shapes lie in; where none does, `set_input_shape` says no."""
        for number in range(self._engine.num_optimization_profiles):
            if all(_within(shape, self._engine.get_tensor_profile_shape(n, number)) for n, shape in shapes.items()):
                if number != self._profile:
                    self._context.set_optimization_profile_async(number, stream.cuda_stream)
                    stream.synchronize()
                    self._profile = number
                return


def _within(shape: Sequence[int], span: Sequence[Sequence[int]]) -> bool:
    low, _, high = (tuple(part) for part in span)
    return len(low) in (0, len(shape)) and all(a <= n <= b for a, n, b in zip(low, shape, high))
