"""Let Polygraphy run an ONNX file: its own runner and input checks, over a session that fuses nothing.

What ONNX Runtime makes of a graph when it optimizes it is what users run, and what an export is compared with; a fault that two of
its fusions share with each other shows where the operators run one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effcompile.core.emitter import check_inputs
from effcompile.core.errors import EffError

CODE = "EFF-E175"


class SecondOpinion:
    """Run a file as Polygraphy does, optimizations off; calls take and give CPU tensors."""

    def __init__(self, path: Path) -> None:
        try:
            from polygraphy.backend.onnxrt import OnnxrtRunner
        except ImportError as error:
            raise EffError(
                CODE, f"Polygraphy is not installed: {error}", hint="pip install 'effcompile[polygraphy]'"
            ) from None
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            told = " ".join(str(error).split())[-300:]
            raise EffError(
                CODE, f"ONNX Runtime does not load {path.name} unoptimized: {told}", hint="eff verify without it"
            ) from error
        self._runner: Any = OnnxrtRunner(session)
        self.inputs: tuple[str, ...] = tuple(item.name for item in session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(item.name for item in session.get_outputs())

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return every output by its name; raises EFF-E111 for other inputs, EFF-E175 where Polygraphy refuses or fails."""
        check_inputs(self.inputs, given)
        try:
            with self._runner as runner:
                found = runner.infer({name: x.detach().cpu().numpy() for name, x in given.items()})
        except Exception as error:
            told = " ".join(str(error).split())[-300:]
            raise EffError(CODE, f"Polygraphy fails: {told}", hint="eff show DIR lists the inputs") from error
        return {name: torch.from_numpy(found[name]) for name in self.outputs}
