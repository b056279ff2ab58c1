"""Build one TensorRT-RTX engine: the file of a job is the argument, lines of JSON come out, the engine goes into a file.

This runs in a process of its own, since the builder may abort; it imports TensorRT-RTX and the standard library alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

_SAME = 0x0040000  # ADDR_NO_RANDOMIZE
_LEVELS = ("INTERNAL_ERROR", "ERROR", "WARNING")


def tell(**fields: Any) -> None:
    """Print one line of JSON."""
    print(json.dumps(fields), flush=True)


def build(job: dict[str, Any]) -> None:
    """Parse, set targets and sizes, build; every complaint of the builder is told as it comes."""
    import tensorrt_rtx as trt

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity.name in _LEVELS:
                tell(level=severity.name, text=text)

    class Progress(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            tell(phase=phase, step=step + 1, steps=self.steps.get(phase, 0))
            return True

        def phase_finish(self, phase: str) -> None:
            tell(phase=phase, step=self.steps.get(phase, 0), steps=self.steps.get(phase, 0))

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["onnx"]):
        for place in range(parser.num_errors):
            error = parser.get_error(place)
            tell(parse=error.desc(), operator=error.node_operator(), node=error.node_name())
        return
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(job["chips"])
    for place, chip in enumerate(job["chips"]):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, chip), place):
            tell(level="ERROR", text=f"{chip} is no compute capability of this version")
            return
    for inputs in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shapes in inputs.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    monitor = Progress()
    config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return
    Path(job["engine"]).write_bytes(memoryview(engine))
    tell(done=True, layers=network.num_layers, version=trt.__version__)


def same_addresses() -> None:
    """Begin anew without random addresses, where Linux lets a process, so that no order in the builder differs with them."""
    if not sys.platform.startswith("linux"):
        return
    personality = ctypes.CDLL(None).personality
    now = personality(0xFFFFFFFF)
    if now != -1 and not now & _SAME and personality(now | _SAME) != -1:
        os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    same_addresses()
    build(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
