"""Export to ONNX: one file for every runtime that reads it, compared with eager in ONNX Runtime."""

from __future__ import annotations

from typing import ClassVar

from effcompile.codegen.onnx.graph import FILE, OPSET, OPSETS, write_onnx
from effcompile.codegen.onnx.session import PROVIDERS, Session
from effcompile.core.bundle import Artifact, Draft
from effcompile.core.emitter import Emitted, Emitter, Job, Runner
from effcompile.core.errors import EffError, unknown
from effcompile.core.site import Refusal
from effcompile.core.target import Target


class Onnx(Emitter):
    """Write `model.onnx`; which chip runs it is its runtime's business."""

    name: ClassVar[str] = "onnx"
    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    extra: ClassVar[str] = "onnx"

    def targets(self) -> tuple[str, ...]:
        """Return `cpu`: the plan is priced for this machine, the file runs anywhere."""
        return ("cpu",)

    def default(self) -> str:
        """Return `cpu`."""
        return "cpu"

    def refuse(self, target: Target) -> Refusal | None:
        """Return None: the operators are standard ones."""
        return None

    def emit(self, job: Job, draft: Draft) -> Emitted:
        """Translate, and compare ONNX Runtime with eager."""
        opset = job.settings.opset or OPSET
        if opset not in OPSETS:
            raise EffError("EFF-E113", f"opset {opset} is not offered; {OPSETS[0]} to {OPSETS[-1]} are")
        job.say("translating")
        inputs, outputs = write_onnx(job.variants[0].exported, draft.folder, opset)
        job.say("checking")
        checks, held = job.check(Session(draft.folder / FILE))
        details = (("opset", str(opset)), ("flavor", "portable"), ("checked at one value", ", ".join(held)))
        return Emitted(inputs, outputs, checks, details)

    def load(self, artifact: Artifact, provider: str, threads: int | None) -> Runner:
        """Return a session of ONNX Runtime."""
        if provider not in PROVIDERS:
            raise unknown("EFF-E112", "provider", provider, PROVIDERS)
        return Session(artifact.file(FILE), provider, threads)
