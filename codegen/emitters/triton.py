"""Export the Triton kernels that a plan uses as binaries for named chips, on any machine; a model, or `kernels:all`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from effcompile.core.bundle import Artifact, Draft
from effcompile.core.emitter import Emitted, Emitter, Job, Runner
from effcompile.core.errors import EffError, unknown
from effcompile.core.site import Refusal
from effcompile.core.target import Target

PREFIX = "kernels:"


class TritonBinaries(Emitter):
    """Compile each kernel for each target, and tell for every launch of the model its grid and its arguments."""

    name: ClassVar[str] = "triton"
    needs: ClassVar[tuple[str, ...]] = ("triton",)
    extra: ClassVar[str] = "triton"
    each_target: ClassVar[bool] = True
    catalog: ClassVar[str] = PREFIX
    without: ClassVar[tuple[str, ...]] = ("outline-layers",)

    def targets(self) -> tuple[str, ...]:
        """Return the chips that kernels are tuned for."""
        from effcompile.codegen.triton.kernel import _RELATIVES, ARCHITECTURES

        return (*ARCHITECTURES, *_RELATIVES)

    def refuse(self, target: Target) -> Refusal | None:
        """Refuse chips that no kernel is tuned for."""
        if target.device.compute in self.targets():
            return None
        known = ", ".join(self.targets())
        return Refusal("EFF-E152", f"no Triton kernel is tuned for {target.device.compute}", f"--target one of {known}")

    def emit(self, job: Job, draft: Draft) -> Emitted:
        """Write the binaries."""
        from effcompile.codegen.triton import calls, library, pool

        wants: dict[tuple[str, str], library.Want] = {}
        found: dict[str, tuple[calls.Call, ...]] = {}
        if not job.variants:
            wants = _catalog(job)
        for variant in job.variants:
            compute = variant.target.device.compute
            found[compute] = calls.calls(variant.program, compute)
            if not found[compute]:
                kept = [x for graph in variant.plan.graphs for x in graph.choices if x.site and x.family != "pass"]
                told = sorted({choice.policy for choice in kept})
                raise EffError(
                    "EFF-E152",
                    f"the plan for {compute} uses no Triton kernel; its sites run on {', '.join(told) or 'nothing'}",
                    hint="--attention block-topk, a model with experts, or kernels:all",
                )
            wants |= library.wants_of(found[compute], compute)
        rows = library.write(
            list(wants.values()), found, draft, seconds=job.settings.seconds, processes=pool.cores(), say=job.say
        )
        spilled = [f"{row['name']} for {row['compute']}" for row in rows if row["spills"]]
        details = (("binaries", str(len(rows))), ("spilled", ", ".join(spilled)))
        return Emitted(details=details)

    def load(self, artifact: Artifact, provider: str, threads: int | None) -> Runner:
        """Return the kernels as a library; they are no model, so calling it is an error.

        The artifact has to be a folder: kernels are read from it when they are asked for.
        """
        from effcompile.codegen.triton.load import Library

        artifact.check_trust("what the artifact holds")
        if artifact.packed:
            raise EffError("EFF-E112", "kernels are loaded from a folder; this is a zip", hint="unpack it")
        return _Kernels(Library(artifact.folder))


class _Kernels:
    """Hold a library where a runner is expected."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def __init__(self, library: Any) -> None:
        self.library = library

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raise EFF-E112."""
        raise EffError(
            "EFF-E112",
            f"the artifact holds kernels, not a model: {', '.join(self.library.names()[:3])} ...",
            hint="python load.py has the loader: Library(DIR).kernel(NAME).launch(grid, arguments)",
        )


def _catalog(job: Job) -> dict[tuple[str, str], Any]:
    """Return the binaries of `kernels:all` or `kernels:flash,decode`: every form that the tests compile."""
    from effcompile.codegen.triton import kernels
    from effcompile.codegen.triton.kernel import architecture
    from effcompile.codegen.triton.library import Want

    asked = [word.strip() for word in job.model.removeprefix(PREFIX).split(",")]
    known = {kernel.name: kernel for kernel in kernels()}
    for word in asked:
        if word != "all" and word not in known:
            raise unknown("EFF-E152", "kernel", word, (*known, "all"))
    found: dict[tuple[str, str], Any] = {}
    for target in job.targets:
        arch = architecture(target.device.compute)
        for kernel in known.values():
            if "all" in asked or kernel.name in asked:
                for form in kernel.forms(arch):
                    want = Want(kernel, form, kernel.configs(form, arch)[0], target.device.compute)
                    found[want.name, want.compute] = want
    return found
