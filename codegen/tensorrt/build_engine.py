"""Build a TensorRT engine on the GPU that will run it: TensorRT times its kernels there, so no other machine can.

    python build_engine.py model.engine          # in the exported folder; needs `pip install tensorrt` and nothing else

`build.json` beside it has the ONNX file, the sizes of the optimization profile and whether weights may be replaced later. Timings
are kept in `model.engine.timing`, which makes the next build fast and the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def tell(**fields: Any) -> None:
    """Print one line of JSON."""
    print(json.dumps(fields), flush=True)


def build(job: dict[str, Any]) -> bool:
    """Build the engine of a job; what the builder says is printed line by line."""
    import tensorrt as trt

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity.name in ("INTERNAL_ERROR", "ERROR", "WARNING"):
                tell(level=severity.name, text=text)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["onnx"]):
        for place in range(parser.num_errors):
            error = parser.get_error(place)
            tell(parse=error.desc(), operator=error.node_operator(), node=error.node_name())
        return False
    config = builder.create_builder_config()
    if job.get("refit"):
        config.set_flag(trt.BuilderFlag.REFIT)
    timing = Path(job["engine"] + ".timing")
    cache = config.create_timing_cache(timing.read_bytes() if timing.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    if job["profile"]:
        profile = builder.create_optimization_profile()
        for name, shapes in job["profile"].items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return False
    Path(job["engine"]).write_bytes(memoryview(engine))
    timing.write_bytes(memoryview(config.get_timing_cache().serialize()))
    tell(done=True, layers=network.num_layers, version=trt.__version__)
    return True


def main(arguments: list[str]) -> int:
    """Read a job (a .json file), or the one beside this file with the engine's path as the argument."""
    if len(arguments) != 2:
        print(__doc__)
        return 2
    given, here = Path(arguments[1]), Path(__file__).resolve().parent
    if given.suffix == ".json":
        job = json.loads(given.read_text(encoding="utf-8"))
    else:
        job = json.loads((here / "build.json").read_text(encoding="utf-8"))
        job = {**job, "onnx": str(here / job["onnx"]), "engine": str(given.resolve())}
    return 0 if build(job) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
