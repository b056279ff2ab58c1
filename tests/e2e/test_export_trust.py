"""No form runs machine code without trust, also where a manifest says that there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

import effcompile as eff
from effcompile.core.artifact import Manifest
from effcompile.core.bundle import writing
from effcompile.core.errors import EffError

HOSTILE = {
    "aoti": ("cpu", {"model.pt2": b"PK", "model.safetensors": b""}),
    "triton": ("cpu", {"kernels.json": b'{"kernels": []}', "code/k.cubin": b"\x7fELF"}),
    "tensorrt": ("tensorrt", {"model.engine": b"engine", "model.onnx": b""}),
    "tensorrt-rtx": ("tensorrt", {"engines/sm_89.engine": b"engine", "model.onnx": b""}),
    "onnx": ("tensorrt", {"model.onnx": b"a graph with com.microsoft EPContext, compiled before"}),
    "tensorrt-cuda": ("cuda", {"model.engine": b"engine", "model.onnx": b"EPContext"}),
}


@pytest.mark.parametrize("form", HOSTILE)
@pytest.mark.parametrize("place", ["a", "a.zip"])
def test_files_that_their_manifest_calls_harmless(form: str, place: str, tmp_path: Path) -> None:
    provider, files = HOSTILE[form]
    with writing(tmp_path / place) as draft:
        for name, data in files.items():
            draft.file(name).write_bytes(data)  # not as machine code
        draft.manifest = Manifest(form=form.removesuffix("-cuda"), model="m", target="cpu", plan_hash="0" * 64)  # type: ignore[arg-type]
    with pytest.raises(EffError, match="EFF-E107"):
        eff.load(tmp_path / place, provider=provider)
