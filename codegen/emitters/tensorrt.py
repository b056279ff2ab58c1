"""Export for TensorRT: the engine on the GPU that it is for; elsewhere the ONNX and a script that finishes there."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch

from effcompile.codegen.onnx.graph import FILE, write_onnx
from effcompile.codegen.onnx.session import Session, open_session
from effcompile.codegen.tensorrt import build_engine
from effcompile.codegen.tensorrt.child import build
from effcompile.codegen.tensorrt.profiles import profiles
from effcompile.codegen.tensorrt.session import EngineSession, chip_here
from effcompile.core.bundle import Artifact, Draft
from effcompile.core.emitter import Emitted, Emitter, Job, Runner, missing
from effcompile.core.errors import EffError, unknown
from effcompile.core.site import Refusal
from effcompile.core.target import Target

OPSET = 20
ENGINE, RECIPE, SCRIPT = "model.engine", "build.json", "build_engine.py"
_DID = {"build": "built", "refit": "built before, its weights replaced", "nothing": "built before"}


class TensorRt(Emitter):
    """Write ONNX that ONNX Runtime checked against eager, a recipe, and the engine where this machine can build it."""

    name: ClassVar[str] = "tensorrt"
    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    extra: ClassVar[str] = "onnx"

    def targets(self) -> tuple[str, ...]:
        """Return NVIDIA's chips from Turing on."""
        from effcompile.targets import devices

        return tuple(dict.fromkeys(device.compute for device in devices() if device.kind == "cuda"))

    def refuse(self, target: Target) -> Refusal | None:
        """Refuse what is not NVIDIA's."""
        if target.device.kind == "cuda":
            return None
        return Refusal(
            "EFF-E150", f"TensorRT runs on NVIDIA GPUs, not on {target.device.compute}", "--to onnx, --to aoti"
        )

    def emit(self, job: Job, draft: Draft) -> Emitted:
        """Write the ONNX and the recipe; build where TensorRT and the GPU are here."""
        if len(job.targets) != 1:
            raise EffError(
                "EFF-E151", "an engine of TensorRT is for one chip", hint="one --target, or --to tensorrt-rtx"
            )
        opset = job.settings.opset or OPSET
        job.say("translating")
        file = write_onnx(job.variants[0].exported, draft.folder, opset, names=job.names)
        inputs, outputs = file.inputs, file.outputs
        job.say("checking")
        checks, fixed = job.check(Session(draft.folder / FILE))
        shapes = profiles(inputs, dict(job.sizes), fixed, job.settings.profile)
        recipe: dict[str, Any] = {"onnx": FILE, "profiles": shapes, "refit": True}
        draft.file(RECIPE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
        script = Path(str(build_engine.__file__))
        draft.file(SCRIPT).write_text(script.read_text(encoding="utf-8"), encoding="utf-8")
        word = job.targets[0].device.compute
        lacking = why_not_here(word)
        details = [("opset", str(opset)), ("checked at one value", ", ".join(fixed))]
        if lacking is None:
            job.say("building")
            held = engine_place(draft.folder / FILE, word, shapes)
            task = {**recipe, "onnx": str(draft.folder / FILE), "engine": str(held), "chips": [word]}
            told = build(task, job.settings.seconds, job.say, (sys.executable, str(script)), "TensorRT")
            shutil.copyfile(held, draft.file(ENGINE, native=True))
            details += [("tensorrt", str(told.get("version", ""))), ("engine", _DID.get(str(told.get("did")), ""))]
        else:
            details.append(("engine", f"not built: {lacking}; on the target: python {SCRIPT} ../{ENGINE}"))
        return Emitted(inputs, outputs, checks, tuple(details))

    def load(self, artifact: Artifact, provider: str, threads: int | None) -> Runner:
        """Return the engine (`tensorrt`), or its ONNX in ONNX Runtime (`cpu`, `cuda`)."""
        if provider in ("cpu", "cuda"):
            return open_session(artifact, FILE, provider, threads)
        if provider != "tensorrt":
            raise unknown("EFF-E112", "provider", provider, ("cpu", "cuda", "tensorrt"))
        if ENGINE not in dict(artifact.manifest.files):
            raise EffError(
                "EFF-E167",
                f"the artifact has no engine: {dict(artifact.manifest.details).get('engine', '')}",
                hint="--provider cpu runs its ONNX",
            )
        path = artifact.file(ENGINE, runs=True)
        chip_here()
        return EngineSession(path, artifact.manifest.inputs, artifact.manifest.outputs, "tensorrt")


def engine_place(model: Path, word: str, shapes: list[dict[str, Any]]) -> Path:
    """Return where the engine of a graph is kept between exports, with its timings: a folder that is this user's alone.

    It lies in TorchInductor's cache, which holds machine code too, so `eff cache clear` removes it. Weights are no part of the
    name: the engine of the same graph with others is refitted.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    told = json.dumps([build_engine.digest(model), word, shapes], sort_keys=True)
    folder = Path(cache_dir(), "effcompile-engines", hashlib.sha256(told.encode()).hexdigest()[:32])
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / ENGINE


def why_not_here(word: str) -> str | None:
    """Return why no engine for a chip can be built on this machine, None where it can."""
    if missing(("tensorrt",)):
        return "tensorrt is not installed"
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    here = chip_here()
    return None if here == word else f"the GPU here is {here}, not {word}"
