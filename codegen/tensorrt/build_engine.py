"""Build a TensorRT engine on the GPU that will run it: TensorRT times its kernels there, so no other machine can.

    python build_engine.py model.engine          # in the exported folder; needs `pip install tensorrt` and nothing else

`build.json` beside it has the ONNX file, the sizes of the optimization profiles and whether weights may be replaced later. Beside
the engine `model.engine.json` says what it was made of, and `model.engine.timing` how long kernels took. Called again, nothing is
done where all of that is the same. Where only the weights are others they are put into the engine that is there (refit), and it
is built anew where that fails. Any other change builds it anew, with the timings that are known.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

WEIGHTS = "weights"
"""The one fact of an engine that may be another one for a refit."""


def tell(**fields: Any) -> None:
    """Print one line of JSON."""
    print(json.dumps(fields), flush=True)


def logger(trt: Any) -> Any:
    """Return a logger that prints what the builder says line by line; the first one of a process is the only one."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity.name in ("INTERNAL_ERROR", "ERROR", "WARNING"):
                tell(level=severity.name, text=text)

    return Log()


def chip() -> str:
    """Return the name of the first GPU as the driver has it, empty where there is none."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return ""
    name, device = ctypes.create_string_buffer(256), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetName(name, 256, device):
        return ""
    return name.value.decode(errors="replace")


def facts(job: dict[str, Any], version: str) -> dict[str, Any]:
    """Return what an engine depends on; small constants are in the ONNX file itself, and so belong to its graph."""
    model = Path(job["onnx"])
    return {
        "graph": digest(model), WEIGHTS: digest(model.with_name(model.name + ".data")), "profiles": job["profiles"],
        "refit": bool(job.get("refit")), "tensorrt": version, "chip": chip(),
    }  # fmt: skip


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, empty where there is none."""
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                found.update(piece)
    except FileNotFoundError:
        return ""
    return found.hexdigest()


def left_to_do(engine: Path, wanted: dict[str, Any]) -> str:
    """Return `nothing`, `refit` or `build`."""
    try:
        have = json.loads(engine.with_name(engine.name + ".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "build"
    if not isinstance(have, dict) or have.pop("sha256", "") != (digest(engine) or "none"):
        return "build"  # half-written, or another one
    if have == wanted:
        return "nothing"
    others = {name for name in {*have, *wanted} if have.get(name) != wanted.get(name)}
    return "refit" if others == {WEIGHTS} and wanted["refit"] else "build"


def refit(trt: Any, log: Any, job: dict[str, Any]) -> bytes | None:
    """Return the engine that is there with the weights of the ONNX file, None where TensorRT does not take them."""
    engine = trt.Runtime(log).deserialize_cuda_engine(Path(job["engine"]).read_bytes())
    if engine is None:
        return None
    refitter = trt.Refitter(engine, log)
    if not trt.OnnxParserRefitter(refitter, log).refit_from_file(job["onnx"]) or not refitter.refit_cuda_engine():
        return None
    return bytes(memoryview(engine.serialize()))


def build(trt: Any, log: Any, job: dict[str, Any]) -> tuple[bytes, int] | None:
    """Return a new engine and how many layers its network has, None where TensorRT refuses; timings are read and kept."""
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["onnx"]):
        for place in range(parser.num_errors):
            error = parser.get_error(place)
            tell(parse=error.desc(), operator=error.node_operator(), node=error.node_name())
        return None
    config = builder.create_builder_config()
    if job.get("refit"):
        config.set_flag(trt.BuilderFlag.REFIT)
    timing = Path(job["engine"] + ".timing")
    cache = config.create_timing_cache(timing.read_bytes() if timing.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    for inputs in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shapes in inputs.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return None
    replace(timing, bytes(memoryview(config.get_timing_cache().serialize())))
    return bytes(memoryview(engine)), int(network.num_layers)


def replace(path: Path, data: bytes) -> None:
    """Put a file in place in one step."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def make(job: dict[str, Any]) -> bool:
    """Do what is left to do for the engine of a job; return whether there is one."""
    import tensorrt as trt

    engine = Path(job["engine"])
    wanted = facts(job, trt.__version__)
    todo = left_to_do(engine, wanted)
    if todo == "nothing":
        tell(done=True, did=todo, version=trt.__version__)
        return True
    log, layers = logger(trt), None
    made = refit(trt, log, job) if todo == "refit" else None
    if made is None:
        todo = "build"
        if (built := build(trt, log, job)) is None:
            return False
        made, layers = built
    record = engine.with_name(engine.name + ".json")
    record.unlink(missing_ok=True)
    replace(engine, made)
    replace(record, json.dumps({**wanted, "sha256": digest(engine)}, indent=1).encode())
    tell(done=True, did=todo, layers=layers, version=trt.__version__)
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
    return 0 if make(job) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
