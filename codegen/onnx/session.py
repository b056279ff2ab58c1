"""Run an ONNX file with ONNX Runtime."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effcompile.codegen.onnx import memory
from effcompile.core.bundle import Artifact
from effcompile.core.emitter import SIZES_HINT, check_inputs
from effcompile.core.errors import EffError

COMPILED = b"EPContext"
"""The operator of a graph that a provider compiled before: an engine, in the file or beside it."""
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


class Session:
    """Hold a loaded model; calls take and give CPU tensors. A cache that is a buffer is written in place."""

    def __init__(self, path: Path, provider: str = "cpu", threads: int | None = None) -> None:
        runtime = _runtime()
        word = PROVIDERS[provider]
        if word not in runtime.get_available_providers():
            have = ", ".join(name for name, full in PROVIDERS.items() if full in runtime.get_available_providers())
            raise EffError(
                "EFF-E112", f"ONNX Runtime here has no {provider}; it has {have}", hint="pip install 'effcompile[gpu]'"
            )
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=[word])
        except Exception as error:
            raise EffError(
                "EFF-E111",
                f"ONNX Runtime does not load {path.name}: {_told(error)}",
                hint="a newer onnxruntime, or a lower --opset; --flavor portable has standard operators alone",
            ) from error
        self.inputs: tuple[str, ...] = tuple(item.name for item in self._session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(item.name for item in self._session.get_outputs())
        self._shared = memory.shared(self._session)

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return every output by its name.

        Raises:
            EffError: EFF-E111 for a missing or an unknown input, and where ONNX Runtime fails, with its words.
        """
        check_inputs(self.inputs, given)
        try:
            if self._shared:
                return memory.run(self._session, given, self._shared, self.outputs)
            found: Sequence[Any] = self._session.run(
                None, {name: x.detach().cpu().numpy() for name, x in given.items()}
            )
        except EffError:
            raise
        except Exception as error:
            raise EffError("EFF-E111", f"ONNX Runtime fails: {_told(error)}", hint=SIZES_HINT) from error
        return {name: torch.from_numpy(x) for name, x in zip(self.outputs, found, strict=True)}


def open_session(artifact: Artifact, name: str, provider: str, threads: int | None) -> Session:
    """Return a session of an ONNX file of an artifact.

    Raises:
        EffError: EFF-E107 without trust where another provider than `cpu`, which knows no such operator, would load an engine
            that the file holds or names. Any mention of the operator counts.
    """
    path = artifact.file(name)
    if provider != "cpu" and _mentions(path, COMPILED):
        artifact.check_trust(f"the compiled part of `{name}`")
    return Session(path, provider, threads)


def _mentions(path: Path, word: bytes) -> bool:
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return text.find(word) >= 0


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EffError(
            "EFF-E112", f"ONNX Runtime is not installed: {error}", hint="pip install 'effcompile[onnx]'"
        ) from None
    return onnxruntime


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[-400:]
