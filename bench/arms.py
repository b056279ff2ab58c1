"""Run a workload in one way: eager, a torch.compile backend, ONNX Runtime or OpenVINO."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.workload import Bound, Workload, primary


@dataclass(frozen=True)
class Ready:
    """Hold an arm that can be called.

    `tensor` turns the call's result into the primary output; `details` tells what was compiled, asked for after the
    first call; `earlier` are seconds of preparation that another arm already spent for this one (a shared ONNX export).
    """

    bound: Bound
    tensor: Callable[[Any], Tensor] = primary
    details: Callable[[], Mapping[str, Any]] = field(default=lambda: {})
    earlier: float = 0.0
    close: Callable[[], None] = field(default=lambda: None)


class Scratch:
    """Keep what arms share while a row is measured: a folder, and one ONNX export of the workload."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._exports: list[OnnxModel | Exception] = []

    def onnx(self, workload: Workload) -> OnnxModel:
        """Return the ONNX model, exporting it the first time; an export that failed raises the same error again."""
        if not self._exports:
            try:
                self._exports.append(export_onnx(workload, self.folder))
            except Exception as error:
                self._exports.append(error)
        result = self._exports[0]
        if isinstance(result, Exception):
            raise result
        return result


@dataclass(frozen=True)
class OnnxModel:
    """Name an exported model, the arrays it is fed (float32 and integers), and the seconds the export took."""

    path: Path
    feeds: Mapping[str, Any]
    seconds: float

    def save_feeds(self) -> None:
        """Write the inputs beside the model, for a process that never imports torch."""
        import numpy

        numpy.savez(self.path.with_suffix(".npz"), **dict(self.feeds))

    @classmethod
    def load(cls, path: Path) -> OnnxModel:
        """Read what `save_feeds` wrote."""
        import numpy

        with numpy.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            return cls(path, {name: arrays[name] for name in arrays.files}, 0.0)


def export_onnx(workload: Workload, folder: Path) -> OnnxModel:
    """Export the workload in float32 with fixed shapes through torch.export."""
    if workload.no_export:
        raise NotImplementedError(workload.no_export)
    begun = time.perf_counter()
    module, tensors = workload.flat(torch.float32)
    path = folder / "model.onnx"
    _quiet("torch.onnx", "onnxscript", "onnx_ir")
    program = torch.onnx.export(
        module, tuple(tensors.values()), dynamo=True, input_names=list(tensors), output_names=["out"], verbose=False
    )
    assert program is not None
    program.save(path)
    feeds = {name: value.detach().cpu().numpy() for name, value in tensors.items()}
    return OnnxModel(path, feeds, time.perf_counter() - begun)


def _quiet(*loggers: str) -> None:
    """Keep notices about packages that no model here uses off the terminal."""
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)


class Arm(ABC):
    """Prepare a workload to be called in one way."""

    name: str
    title: str
    exports: bool = False
    """Whether it runs an ONNX file instead of the module."""

    @property
    def compiles(self) -> bool:
        """Tell whether preparing it, or its first call, does more than any later call."""
        return True

    def refuses(self, workload: Workload) -> str | None:
        """Return why this arm cannot run such a workload at all, else None."""
        return None

    @abstractmethod
    def prepare(self, workload: Workload, scratch: Scratch, threads: int) -> Ready:
        """Return the arm ready for its first call, which may still compile."""


@dataclass(frozen=True)
class TorchArm(Arm):
    """Run the module through torch, with a torch.compile backend or none; shapes are fixed, as they are for ONNX."""

    name: str
    title: str
    backend: str | None = None
    mode: str | None = None
    frozen: bool = False

    @property
    def compiles(self) -> bool:
        """Tell whether there is a backend."""
        return self.backend is not None

    def prepare(self, workload: Workload, scratch: Scratch, threads: int) -> Ready:
        """Return the call of the module or of its compiled form."""
        function: Callable[..., Any] = workload.module
        if self.backend is not None:
            # Every row has one shape, and the rows before it must not teach Dynamo to expect others.
            function = torch.compile(workload.module, backend=self.backend, mode=self.mode, dynamic=False)
        seen = counters()
        bound = workload.bind(function, workload.dtype)
        if self.frozen:
            bound = Bound(_frozen(bound.call), bound.rewind)
        if workload.device == "cuda" and self.backend is not None:
            bound = Bound(_new_step(bound.call), bound.rewind)
        return Ready(bound, details=lambda: self._details(seen))

    def _details(self, seen: Counter[str]) -> dict[str, Any]:
        if self.backend is None:
            return {}
        found: dict[str, Any] = dict(counters() - seen)
        return found | eff_details() if self.backend == "eff" else found


def counters() -> Counter[str]:
    """Return how many graphs Dynamo compiled in this process, how often one broke, and the caches' hits."""
    from torch._dynamo.utils import counters as all_counters

    total: Counter[str] = Counter()
    total["graphs"] = all_counters["stats"].get("unique_graphs", 0)
    total["graph_breaks"] = sum(all_counters["graph_break"].values())
    total["autograd_cache_hit"] = all_counters["aot_autograd"].get("autograd_cache_hit", 0)
    total["fxgraph_cache_hit"] = all_counters["inductor"].get("fxgraph_cache_hit", 0)
    return total


def eff_details() -> dict[str, Any]:
    """Return what eff did: counters, stage seconds, sites by kernel, notices and missed sites, over all graphs."""
    import effcompile

    summary = effcompile.report()
    stages: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for graph in summary["graphs"]:
        stages.update(graph["seconds"])
        kernels.update(site["kernel"] for site in graph["sites"])
    return {
        "counters": summary["counters"],
        "stage_seconds": {name: float(f"{value:.4g}") for name, value in stages.items()},
        "kernels": dict(kernels),
        "notices": summary["notices"],
        "missed": [item["refusal"] for graph in summary["graphs"] for item in graph["missed"]],
        "notes": [note for graph in summary["graphs"] for note in graph["notes"]],
    }


def _frozen(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with _freezing():
            return call()

    return run


@contextlib.contextmanager
def _freezing() -> Iterator[None]:
    # Dynamo reads the global setting while it traces, and guards on nothing, so it is set around every call.
    from torch._inductor import config

    with config.patch(freezing=True):
        yield


def _new_step(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return call()

    return run


def known_arms() -> dict[str, Arm]:
    """Return every arm by name, in the order of the report."""
    from bench.arms_onnx import OnnxRuntime, OpenVino

    arms: list[Arm] = [
        TorchArm("eager", "PyTorch eager"),
        TorchArm("inductor", "TorchInductor", "inductor"),
        TorchArm("inductor-max-autotune", "TorchInductor max-autotune", "inductor", "max-autotune"),
        TorchArm("inductor-frozen", "TorchInductor max-autotune, frozen", "inductor", "max-autotune", frozen=True),
        OnnxRuntime(),
        OpenVino(),
        TorchArm("eff", "eff", "eff"),
        TorchArm("eff-max-autotune", "eff max-autotune", "eff", "max-autotune"),
        TorchArm("aot-eager", "Dynamo and AOTAutograd, no compiler", "aot_eager"),
    ]
    return {arm.name: arm for arm in arms}


def default_arms(device: str) -> tuple[str, ...]:
    """Return the arms of a device: on a GPU those that run there, with max-autotune for both compilers."""
    if device == "cuda":
        return ("eager", "inductor", "inductor-max-autotune", "eff", "eff-max-autotune")
    return ("eager", "inductor", "inductor-max-autotune", "onnxruntime", "openvino", "eff")


def known_names(device: str) -> tuple[str, ...]:
    """Return the names of the arms that a device can run."""
    return tuple(name for name, arm in known_arms().items() if device == "cpu" or not arm.exports)


def as_json(value: Any) -> Any:
    """Return the value as JSON values, turning what JSON lacks into text."""
    return json.loads(json.dumps(value, default=str))
