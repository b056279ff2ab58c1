"""Export to ONNX: one file for every runtime that reads it, compared with eager in ONNX Runtime."""

from __future__ import annotations

from typing import ClassVar

from effcompile.codegen.onnx.graph import FILE, OPSET, OPSETS, write_onnx
from effcompile.codegen.onnx.session import PROVIDERS, Session, open_session
from effcompile.core.bundle import Artifact, Draft
from effcompile.core.emitter import Emitted, Emitter, Job, Runner, Settings
from effcompile.core.errors import EffError, unknown
from effcompile.core.export_form import FLAVORS, Dialect
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

    def dialect(self, settings: Settings) -> Dialect:
        """Return the opset and the flavor that were asked for."""
        opset = settings.opset or OPSET
        if opset not in OPSETS:
            raise EffError(
                "EFF-E113",
                f"opset {opset} is not offered; {OPSETS[0]} to {OPSETS[-1]} are",
                hint=f"--opset {OPSET} is read by every runtime",
            )
        if settings.flavor not in FLAVORS:
            raise unknown("EFF-E113", "flavor of ONNX", settings.flavor, FLAVORS)
        return Dialect(opset, settings.flavor)

    def refuse(self, target: Target) -> Refusal | None:
        """Return None: the operators are standard ones, or those of the runtime that the flavor names."""
        return None

    def emit(self, job: Job, draft: Draft) -> Emitted:
        """Translate, and compare ONNX Runtime with eager."""
        opset, variant = job.settings.opset or OPSET, job.variants[0]
        job.say("translating")
        file = write_onnx(variant.exported, draft.folder, opset, variant.functions, job.names)
        job.say("checking")
        checks, held = job.check(Session(draft.folder / FILE))
        details = (("opset", str(opset)), ("flavor", job.settings.flavor), ("nodes", str(file.nodes)), *variant.details)
        return Emitted(file.inputs, file.outputs, checks, (*details, ("checked at one value", ", ".join(held))))

    def load(self, artifact: Artifact, provider: str, threads: int | None) -> Runner:
        """Return a session of ONNX Runtime."""
        if provider not in PROVIDERS:
            raise unknown("EFF-E112", "provider", provider, PROVIDERS)
        return open_session(artifact, FILE, provider, threads)
