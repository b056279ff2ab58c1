"""The builder's process: whatever it does, an engine comes out or an error with a code, and nothing half-written stays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from effcompile.codegen.tensorrt.child import build
from effcompile.codegen.tensorrt.complaints import complaint
from effcompile.codegen.tensorrt.profiles import parse_profile, profile, profiles, sizes_of
from effcompile.core.artifact import TensorInfo
from effcompile.core.errors import EffError

WRITES = "import json,sys; job=json.load(open(sys.argv[1])); open(job['engine'],'wb').write(b'half'); "
BAD = {
    "aborts": ("EFF-E162 .*SIGABRT", WRITES + "import os; os.abort()"),
    "segfaults": ("EFF-E162 .*SIGSEGV", WRITES + "import os,signal; os.kill(os.getpid(), signal.SIGSEGV)"),
    "raises": ("EFF-E162 .*no such chip", "raise SystemExit('no such chip')"),
    "sleeps": ("EFF-E163", WRITES + "import time; time.sleep(60)"),
    "floods and sleeps": ("EFF-E163", "import time\nwhile True: print('{}' * 999, flush=True)"),
    "says nothing": ("EFF-E161 .*nothing was logged", WRITES + "print('no JSON')"),
    "claims an engine": ("EFF-E161", "print('{\"done\": true}')"),
    "complains": (
        "EFF-E161 .*float16 alone",
        "import json; print(json.dumps({'level': 'ERROR', 'text': 'is not supported by a dedicated kernel'}))",
    ),
    "refuses an operator": (
        "EFF-E160 .*no form of an operator.*MoE",
        "import json; print(json.dumps({'parse': 'Plugin not found', 'operator': 'MoE', 'node': 'n7'}))",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_builder_that_fails(what: str, tmp_path: Path) -> None:
    told, program = BAD[what]
    job = {"onnx": "", "engine": str(tmp_path / "e"), "chips": ["SM89"], "profiles": []}
    with pytest.raises(EffError, match=told) as caught:
        build(job, 2.0, command=(sys.executable, "-c", program))
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_builder_that_works_tells_its_progress(tmp_path: Path) -> None:
    program = (
        WRITES
        + "print(json.dumps({'phase': 'Parse', 'step': 1, 'steps': 3})); print('{\"done\": true, \"layers\": 4}')"
    )
    heard: list[str] = []
    job = {"onnx": "", "engine": str(tmp_path / "e"), "chips": ["SM89"], "profiles": []}
    assert build(job, 20.0, heard.append, (sys.executable, "-c", program))["layers"] == 4
    assert heard == ["Parse 1/3"]
    assert (tmp_path / "e").read_bytes() == b"half"


def test_every_complaint_has_a_reason() -> None:
    for text in ("std::bad_alloc", "profile 0 is wrong", "Plugin not found", "something else"):
        error = complaint([{"level": "ERROR", "text": text}], "", "TensorRT-RTX")
        assert error.code == "EFF-E161"
        assert text in error.message


INPUTS = (
    TensorInfo("tokens", "int64", ("s0", "s1")),
    TensorInfo("x", "float32", ("s0", "2*s1", 3)),
    TensorInfo("y", "float32", (4,)),
)


def test_profiles() -> None:
    made = profile(INPUTS, {"s0": 2, "s1": 16}, [], parse_profile("tokens.1=1:20:99"))
    assert made == {"tokens": [[1, 1], [2, 20], [8, 99]], "x": [[1, 2, 3], [2, 40, 3], [8, 198, 3]]}
    held = profile(INPUTS, {"s0": 2, "s1": 16}, ["s1"], {})
    assert held["tokens"] == [[1, 16], [2, 16], [8, 16]]


def test_several_profiles() -> None:
    made = profiles(INPUTS, {"s0": 2, "s1": 16}, [], "tokens.1=8:8:8;tokens.1=16:16:16")
    assert [shapes["tokens"] for shapes in made] == [[[1, 8], [2, 8], [8, 8]], [[1, 16], [2, 16], [8, 16]]]
    assert sizes_of(made)[0] == ("sizes of tokens (1)", "[1, 8] to [2, 8] to [8, 8]")
    assert profiles(INPUTS[2:], {}, [], "") == []
    with pytest.raises(EffError, match="EFF-E166"):
        profiles(INPUTS, {"s0": 2, "s1": 16}, [], "tokens.1=8:8:8;tokens.1=9")


@pytest.mark.parametrize(
    "text", ["tokens.1", "tokens.1=1:2", "tokens.1=0:1:2", "tokens.1=3:2:4", "tokens.1=a:b:c", "y.0=1:2:3", "x.1=1:2:3"]
)
def test_profiles_that_are_none(text: str) -> None:
    with pytest.raises(EffError, match="EFF-E166"):
        profile(INPUTS, {"s0": 2, "s1": 16}, [], parse_profile(text))
