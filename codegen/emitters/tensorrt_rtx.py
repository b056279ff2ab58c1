"""Export TensorRT-RTX engines for named chips, on a machine without a GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from effcompile.codegen.onnx.graph import FILE, write_onnx
from effcompile.codegen.onnx.session import Session, open_session
from effcompile.codegen.tensorrt.child import COMMAND, build
from effcompile.codegen.tensorrt.profiles import profiles, sizes_of
from effcompile.core.bundle import Artifact, Draft
from effcompile.core.emitter import Emitted, Emitter, Job, Runner
from effcompile.core.errors import EffError, unknown
from effcompile.core.site import Refusal
from effcompile.core.target import Target

CHIPS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
PLAIN, FUSED = 20, 23
"""Opset without attention, and with one `Attention` node a site, which TensorRT-RTX takes in float16."""


class TensorRtRtx(Emitter):
    """Write ONNX, compare it with eager, build an engine of it that holds all targets (sm_75 has one of its own)."""

    name: ClassVar[str] = "tensorrt-rtx"
    needs: ClassVar[tuple[str, ...]] = ("tensorrt_rtx", "onnx", "onnxscript", "onnxruntime")
    extra: ClassVar[str] = "rtx"
    command: ClassVar[Sequence[str]] = COMMAND

    def targets(self) -> tuple[str, ...]:
        """Return the chips of the RTX family."""
        return CHIPS

    def refuse(self, target: Target) -> Refusal | None:
        """Refuse data-center chips after Ampere, and other makers' chips."""
        word = target.device.compute
        if word in CHIPS:
            return None
        if target.device.kind == "cuda":
            return Refusal(
                "EFF-E150",
                f"TensorRT-RTX has no {word}: it is for {', '.join(CHIPS)}",
                f"--to tensorrt --target {word} writes what TensorRT needs there; --to triton and --to onnx run there too",
            )
        return Refusal("EFF-E150", f"TensorRT-RTX runs on NVIDIA's RTX chips, not on {word}", "--to onnx, --to aoti")

    def emit(self, job: Job, draft: Draft) -> Emitted:
        """Build; where the operators of the newest form are refused, the plain ones are tried and the reason is kept."""
        words = [target.device.compute for target in job.targets]
        half = any(x.dtype == torch.float16 for x in job.variants[0].exported.state_dict.values())
        tries = [job.settings.opset] if job.settings.opset else [FUSED, PLAIN] if half else [PLAIN]
        refused: list[str] = []
        for opset in tries:
            try:
                return self._built(job, draft, opset, words, refused)
            except EffError as error:
                if error.code not in ("EFF-E109", "EFF-E160", "EFF-E161", "EFF-E162") or opset == tries[-1]:
                    raise
                refused.append(f"opset {opset}: {error.message}")
        raise AssertionError("one of the forms returns or raises")

    def _built(self, job: Job, draft: Draft, opset: int, words: Sequence[str], refused: Sequence[str]) -> Emitted:
        for old in draft.folder.glob(f"{FILE}*"):
            old.unlink()
        job.say(f"translating (opset {opset})")
        file = write_onnx(job.variants[0].exported, draft.folder, opset, names=job.names)
        inputs, outputs = file.inputs, file.outputs
        job.say("checking")
        checks, held = job.check(Session(draft.folder / FILE))
        shapes = profiles(inputs, dict(job.sizes), held, job.settings.profile)
        details: list[tuple[str, str]] = [
            ("opset", str(opset)),
            ("attention", "fused" if opset >= FUSED else "decomposed"),
        ]
        details += [("gave way", "; ".join(refused))] if refused else []
        details += sizes_of(shapes)
        details.append(("checked at one value", ", ".join(held)))
        for group in _groups(words):
            name = f"engines/{'+'.join(group)}.engine"
            begun = time.perf_counter()
            task: dict[str, Any] = {
                "onnx": str(draft.folder / FILE),
                "engine": str(draft.file(name, native=True)),
                "chips": [word.replace("_", "").upper() for word in group],
                "profiles": shapes,
            }
            told = build(task, job.settings.seconds, lambda text: job.say(f"building: {text}"), self.command)
            job.say(f"built {name} in {time.perf_counter() - begun:.1f} s")
            details.append((f"layers of {name}", str(told.get("layers"))))
            details = [*(x for x in details if x[0] != "tensorrt_rtx"), ("tensorrt_rtx", str(told.get("version", "")))]
        return Emitted(inputs, outputs, checks, tuple(details))

    def load(self, artifact: Artifact, provider: str, threads: int | None) -> Runner:
        """Return the engine for the GPU that is here (`tensorrt`), or its ONNX in ONNX Runtime (`cpu`, `cuda`)."""
        if provider in ("cpu", "cuda"):
            return open_session(artifact, FILE, provider, threads)
        if provider != "tensorrt":
            raise unknown("EFF-E112", "provider", provider, ("cpu", "cuda", "tensorrt"))
        from effcompile.codegen.tensorrt.session import EngineSession, chip_here

        engines = {name: entry for name, entry in artifact.manifest.files if name.endswith(".engine")}
        names = {word: name for name in engines for word in Path(name).stem.split("+")}
        paths = {word: artifact.file(name, runs=True) for word, name in names.items()}  # refuses without trust
        word = chip_here()
        if word not in paths:
            raise EffError(
                "EFF-E165",
                f"the artifact has no engine for {word}; it has {', '.join(names)}",
                hint=f"eff export MODEL --to tensorrt-rtx --target {word}, or --provider cpu",
            )
        return EngineSession(paths[word], artifact.manifest.inputs, artifact.manifest.outputs)


def _groups(words: Sequence[str]) -> list[list[str]]:
    """Return which chips share an engine: all but sm_75, with which the builder refuses float32 products and bfloat16."""
    newer = [word for word in words if word != "sm_75"]
    return [group for group in (newer, [word for word in words if word == "sm_75"]) if group]
