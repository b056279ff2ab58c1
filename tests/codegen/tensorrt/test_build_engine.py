"""The script that finishes on the target: what it does again, and what it leaves, beside a stand-in of TensorRT that records calls.

The stand-in says nothing of TensorRT itself, which runs on a GPU alone (tests/e2e/test_export_engines.py, marker gpu).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from effcompile.codegen.tensorrt import build_engine

STAND_IN = """
import json, os, pathlib
__version__ = os.environ.get("TRT_VERSION", "11.4")
FAILS = os.environ.get("TRT_FAILS", "")
def note(word): print(json.dumps({"call": word}), flush=True)
class ILogger:
    def __init__(self): pass
class NetworkDefinitionCreationFlag: STRONGLY_TYPED = 1
class BuilderFlag: REFIT = "refit"
class Cache:
    def __init__(self, data): self.data = data
    def serialize(self): return self.data + b"+"
class Config:
    def set_flag(self, flag): note("flag " + flag)
    def create_timing_cache(self, data): note(f"timings {len(data)}"); self.cache = Cache(data); return self.cache
    def set_timing_cache(self, cache, ignore_mismatch): pass
    def get_timing_cache(self): return self.cache
    def add_optimization_profile(self, profile): pass
class Profile:
    def set_shape(self, name, low, best, high): note(f"{name} {low} {best} {high}")
class Network: num_layers = 3
class Builder:
    def __init__(self, log): pass
    def create_network(self, flags): return Network()
    def create_builder_config(self): return Config()
    def create_optimization_profile(self): return Profile()
    def build_serialized_network(self, network, config):
        note("build")
        return None if "build" in FAILS else b"E" + pathlib.Path("model.onnx.data").read_bytes()
class Error:
    desc = lambda self: "Plugin not found"
    node_operator = lambda self: "MoE"
    node_name = lambda self: "n1"
class OnnxParser:
    num_errors = 1
    def __init__(self, network, log): pass
    def parse_from_file(self, path): return "parse" not in FAILS
    def get_error(self, place): return Error()
class Engine:
    def __init__(self, data): self.data = data
    def serialize(self): return self.data
class Runtime:
    def __init__(self, log): pass
    def deserialize_cuda_engine(self, data): note("load"); return None if "load" in FAILS else Engine(data)
class Refitter:
    def __init__(self, engine, log): self.engine = engine
    def refit_cuda_engine(self): note("refit"); return "refit" not in FAILS
class OnnxParserRefitter:
    def __init__(self, refitter, log): self.refitter = refitter
    def refit_from_file(self, path):
        self.refitter.engine.data = b"E" + pathlib.Path("model.onnx.data").read_bytes()
        return True
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an exported folder with the script, and the stand-in beside it."""
    made = tmp_path / "out"
    made.mkdir()
    (tmp_path / "tensorrt.py").write_text(STAND_IN)
    (made / "model.onnx").write_bytes(b"graph")
    (made / "model.onnx.data").write_bytes(b"weights")
    (made / "build.json").write_text(
        json.dumps({"onnx": "model.onnx", "profiles": [{"x": [[1], [2], [8]]}], "refit": True})
    )
    (made / "build_engine.py").write_text(Path(str(build_engine.__file__)).read_text())
    return made


def ran(folder: Path, code: int = 0, **environment: str) -> tuple[str, list[str], list[Any]]:
    """Run the script; return what it did, the calls of the stand-in, and all lines."""
    place = folder.parent
    command = [sys.executable, "build_engine.py", str(place / "model.engine")]
    known = {"PYTHONPATH": str(place), "PATH": "", **environment}
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=known)
    assert found.returncode == code, found.stderr
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    calls = [line["call"] for line in lines if "call" in line]
    return next((line["did"] for line in lines if line.get("done")), ""), calls, lines


def test_an_engine_is_built_once_and_refitted(folder: Path) -> None:
    engine = folder.parent / "model.engine"
    did, calls, _ = ran(folder)
    assert did == "build"
    assert calls == ["flag refit", "timings 0", "x [1] [2] [8]", "build"]
    assert ran(folder)[:2] == ("nothing", [])
    (folder / "model.onnx.data").write_bytes(b"others")
    assert ran(folder)[:2] == ("refit", ["load", "refit"])
    assert engine.read_bytes() == b"Eothers"
    assert ran(folder)[0] == "nothing"
    (folder / "model.onnx").write_bytes(b"another graph")
    did, calls, _ = ran(folder)
    assert did == "build"
    assert "timings 1" in calls  # what was timed before is known
    assert sorted(path.name for path in folder.parent.iterdir() if path.name.startswith("model")) == [
        "model.engine", "model.engine.json", "model.engine.timing",
    ]  # fmt: skip


@pytest.mark.parametrize("change", ["version", "profiles", "engine", "record", "no refit"])
def test_what_makes_it_build_anew(folder: Path, change: str) -> None:
    engine, recipe = folder.parent / "model.engine", json.loads((folder / "build.json").read_text())
    ran(folder)
    environment = {"TRT_VERSION": "12.0"} if change == "version" else {}
    if change == "profiles":
        recipe["profiles"][0]["x"] = [[1], [4], [8]]
    if change == "no refit":
        recipe["refit"] = False
        (folder / "model.onnx.data").write_bytes(b"others")
    (folder / "build.json").write_text(json.dumps(recipe))
    if change == "engine":
        engine.write_bytes(b"half")
    if change == "record":
        (folder.parent / "model.engine.json").write_text("[]")
    assert ran(folder, **environment)[0] == "build"


@pytest.mark.parametrize("fails", ["load", "refit"])
def test_a_refit_that_fails_builds(folder: Path, fails: str) -> None:
    ran(folder)
    (folder / "model.onnx.data").write_bytes(b"others")
    did, calls, _ = ran(folder, TRT_FAILS=fails)
    assert did == "build"
    assert calls[-1] == "build"
    assert (folder.parent / "model.engine").read_bytes() == b"Eothers"


@pytest.mark.parametrize("fails", ["build", "parse"])
def test_a_build_that_fails_leaves_the_engine_that_was_there(folder: Path, fails: str) -> None:
    ran(folder)
    (folder / "model.onnx").write_bytes(b"another graph")
    _, _, lines = ran(folder, 1, TRT_FAILS=fails)
    assert (folder.parent / "model.engine").read_bytes() == b"Eweights"
    assert not list(folder.parent.glob("*.part"))
    assert any(line.get("operator") == "MoE" for line in lines) == (fails == "parse")


def test_without_arguments_it_says_what_it_does(folder: Path) -> None:
    found = subprocess.run([sys.executable, "build_engine.py"], cwd=folder, capture_output=True, text=True)
    assert found.returncode == 2
    assert "python build_engine.py" in found.stdout
