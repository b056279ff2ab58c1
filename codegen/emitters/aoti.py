"""Export to a `.pt2` of AOTInductor, for this machine's CPU, or for the GPU that is here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from effcompile.codegen.aoti.package import FILE, WEIGHTS, tensors_of, write_package
from effcompile.codegen.aoti.session import AotiSession
from effcompile.core.artifact import AGAIN
from effcompile.core.bundle import Artifact, Draft
from effcompile.core.emitter import Emitted, Emitter, Job, Runner
from effcompile.core.errors import EffError
from effcompile.core.processor import instructions
from effcompile.core.site import Refusal
from effcompile.core.target import Target

_NEEDS = "instructions"


class Aoti(Emitter):
    """Compile the program that `torch.compile` would run, with this project's kernels, and compare it with eager."""

    name: ClassVar[str] = "aoti"
    needs: ClassVar[tuple[str, ...]] = ("safetensors",)
    without: ClassVar[tuple[str, ...]] = ("outline-layers",)

    def targets(self) -> tuple[str, ...]:
        """Return `cpu`, and the GPU that is here."""
        if not torch.cuda.is_available():
            return ("cpu",)
        major, minor = torch.cuda.get_device_capability()
        return ("cpu", f"sm_{major}{minor}")

    def default(self) -> str:
        """Return `cpu`."""
        return "cpu"

    def refuse(self, target: Target) -> Refusal | None:
        """Refuse chips that are not here: TorchInductor compiles and tunes on the device itself."""
        if target.device.kind == "cpu" or target.device.compute in self.targets():
            return None
        return Refusal(
            "EFF-E170",
            f"AOTInductor compiles for the device that is here ({', '.join(self.targets())}), not for {target.device.compute}",
            "run the export on that machine, or --to triton and --to onnx",
        )

    def emit(self, job: Job, draft: Draft) -> Emitted:
        """Compile, save the weights, run."""
        (variant,) = job.variants
        device = "cpu" if variant.target.device.kind == "cpu" else "cuda"
        odd = [name for name, x in variant.exported.state_dict.items() if x.device.type != device]
        if odd:
            raise EffError(
                "EFF-E170", f"`{odd[0]}` is not on {device}", hint=f"move the model and its inputs to {device}"
            )
        inputs, outputs = tensors_of(variant.exported)
        names = [x.name for x in inputs], [x.name for x in outputs]
        path, weights = draft.file(FILE, native=True), draft.file(WEIGHTS)
        job.say("compiling")
        write_package(variant.exported, path, weights, lambda made: AotiSession(made, *names, device).constants())
        job.say("checking")
        checks, held = job.check(_loaded(AotiSession(path, *names, device), weights))
        details = (("device", device), ("checked at one value", ", ".join(held)), (_NEEDS, " ".join(instructions())))
        return Emitted(inputs, outputs, checks, details)

    def load(self, artifact: Artifact, provider: str, threads: int | None) -> Runner:
        """Return the package with its weights; only where it is trusted, and on the device that it was compiled for."""
        device = dict(artifact.manifest.details).get("device", "cpu")
        if provider != device:
            raise EffError("EFF-E112", f"the package is for {device}, not for {provider}", hint=f"--provider {device}")
        if device == "cuda" and not torch.cuda.is_available():
            raise EffError(
                "EFF-E112", "the package is for a GPU, and torch sees none here", hint="eff doctor; --target cpu"
            )
        _check_processor(dict(artifact.manifest.details).get(_NEEDS, "").split())
        names = [x.name for x in artifact.manifest.inputs], [x.name for x in artifact.manifest.outputs]
        return _loaded(AotiSession(artifact.file(FILE, runs=True), *names, device), artifact.file(WEIGHTS))


def _check_processor(needed: Sequence[str]) -> None:
    """Raise EFF-E112 where the code may use instructions that this processor does not know: they would end the process."""
    here = instructions()
    lacking = [word for word in needed if word not in here]
    if here and lacking:
        some = ", ".join([*lacking[:6], *(["..."] if len(lacking) > 6 else [])])
        raise EffError(
            "EFF-E112",
            f"the package is compiled for a CPU with {some}, and this one has not",
            hint="export it on this kind of CPU, or --to onnx",
        )


def _loaded(session: AotiSession, weights: object) -> AotiSession:
    from safetensors.torch import load_file

    try:
        values = load_file(str(weights))
    except Exception as error:
        raise EffError("EFF-E172", f"the weights cannot be read: {error}", hint=AGAIN) from None
    session.load_constants(values)
    return session
