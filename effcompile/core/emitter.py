"""Say what a form of an export is: which targets it can do, how its files are written, and what runs them again.

One file in `codegen/emitters/` answers one value of `to=`. Support is a question with a reason as the answer, as everywhere.
"""

from __future__ import annotations

import functools
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from effcompile.core.artifact import Check, TensorInfo
from effcompile.core.bundle import Artifact, Draft
from effcompile.core.errors import EffError
from effcompile.core.export_form import Dialect
from effcompile.core.plan import Plan
from effcompile.core.program import Program
from effcompile.core.site import Refusal
from effcompile.core.target import Target

Say = Callable[[str], None]
INPUTS_HINT = "eff show DIR lists the inputs with their sizes"
SIZES_HINT = "eff show DIR lists which sizes of an input may vary"


class Runner(Protocol):
    """Run an artifact: a call takes tensors by input name and gives outputs by name."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return every output by its name."""


Checker = Callable[[Runner], tuple[tuple[Check, ...], tuple[str, ...]]]
"""Compare with eager, at the given sizes and with every size that varies at another one; raises EFF-E110 where they differ.

Returns the comparisons, and the sizes that could not be changed alone since the model holds them to others.
"""


@dataclass(frozen=True)
class Settings:
    """Hold what some emitters read.

    `opset` is that of ONNX (0: the emitter's own), `seconds` what one build of an engine may take, `profile` the sizes that an
    engine takes (`tokens.1=1:128:2048`), `flavor` whose operators an ONNX file may hold.
    """

    opset: int = 0
    seconds: float = 600.0
    profile: str = ""
    flavor: str = "portable"


@dataclass(frozen=True)
class Names:
    """Say what inputs and outputs are called, and each size of each input (None: as torch calls it, or a number)."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    sizes: tuple[tuple[str | None, ...], ...] = ()


@dataclass(frozen=True)
class Variant:
    """Hold the model as it is for one target: the plan, the lowered program, and what makes an ExportedProgram of it.

    `functions` are the bodies of operators of ONNX that are ours, `details` what the manifest says of forms of ONNX.
    """

    target: Target
    plan: Plan
    program: Program
    restore: Callable[[], Any]
    functions: tuple[str, ...] = ()
    details: tuple[tuple[str, str], ...] = ()

    @functools.cached_property
    def exported(self) -> Any:
        """Return the program as an ExportedProgram, which not every form needs."""
        return self.restore()


@dataclass(frozen=True)
class Job:
    """Hold what an emitter gets: one variant a target where it asks for that (`each_target`), else one for all `targets`.

    `sizes` are the values, in the example call, of the sizes that may vary.
    """

    model: str
    targets: tuple[Target, ...]
    variants: tuple[Variant, ...]
    sizes: tuple[tuple[str, int], ...]
    settings: Settings
    check: Checker
    say: Say
    names: Names = Names()


@dataclass(frozen=True)
class Emitted:
    """Hold what an emitter tells of the files that it wrote, for the manifest."""

    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    checks: tuple[Check, ...] = ()
    details: tuple[tuple[str, str], ...] = ()


class Emitter(ABC):
    """Answer one value of `to=`.

    `name` is that value, and the backend of its targets; `needs` are the packages that writing takes, `extra` what installs them.
    `catalog` is how the names begin that can stand for a model; `without` names passes whose result the form cannot hold.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    each_target: ClassVar[bool] = False
    catalog: ClassVar[str] = ""
    without: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def targets(self) -> tuple[str, ...]:
        """Return the compute words that it can do, the default first where it has one."""

    def default(self) -> str:
        """Return the target of a call that names none, or raise EFF-E151."""
        raise EffError(
            "EFF-E151", f"{self.name} is built for named chips: {', '.join(self.targets())}", hint="--target sm_89"
        )

    def dialect(self, settings: Settings) -> Dialect | None:
        """Return which operators of ONNX may stand in the lowered graph, None for none; raises EFF-E113 for what is not offered."""
        return None

    @abstractmethod
    def refuse(self, target: Target) -> Refusal | None:
        """Return why it cannot build for a target, None where it can; no package is needed to ask."""

    @abstractmethod
    def emit(self, job: Job, draft: Draft) -> Emitted:
        """Write the files of an artifact and check what this machine can check."""

    @abstractmethod
    def load(self, artifact: Artifact, provider: str, threads: int | None) -> Runner:
        """Return what runs an artifact here; raises EffError where nothing can."""


def check_inputs(names: Sequence[str], given: Mapping[str, Tensor]) -> None:
    """Raise EFF-E111 unless a call has the inputs of these names and no others."""
    told = ", ".join(names)
    if lacking := [name for name in names if name not in given]:
        raise EffError("EFF-E111", f"input `{lacking[0]}` is missing; the model takes {told}", hint=INPUTS_HINT)
    if odd := [name for name in given if name not in names]:
        raise EffError("EFF-E111", f"the model has no input `{odd[0]}`; it takes {told}", hint=INPUTS_HINT)


def missing(packages: Sequence[str]) -> list[str]:
    """Return the packages that are not installed."""
    return [package for package in packages if importlib.util.find_spec(package) is None]
