"""Run a `.pt2` of AOTInductor; it cannot be called before its constants are there."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effcompile import ops
from effcompile.codegen.aoti.package import quietly
from effcompile.core.artifact import AGAIN
from effcompile.core.emitter import SIZES_HINT, check_inputs
from effcompile.core.errors import EffError

_MOST = 10_000  # members of an honest package: some files a graph
WEIGHTS_HINT = "weights.safetensors of the same export has them: load_constants(load_file(...))"


def check_package(path: Path) -> None:
    """Look at the names in a package: torch's loader writes a member called `../x` outside of its folder.

    Raises:
        EffError: EFF-E174 for a file that is no zip, and for a member that would not stay inside.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise EffError("EFF-E174", f"{path.name} is no package of AOTInductor: {error}", hint=AGAIN) from None
    for name in names:
        if name.startswith(("/", "\\")) or ":" in name or ".." in name.replace("\\", "/").split("/"):
            raise EffError(
                "EFF-E174",
                f"{path.name} has a member called {name[:80]!r}, which would be written elsewhere",
                hint="do not trust where it comes from",
            )
    if len(names) > _MOST or len(set(names)) != len(names):
        raise EffError("EFF-E174", f"{path.name} has {len(names)} members, some of one name or too many", hint=AGAIN)


class AotiSession:
    """Hold a loaded package; `load_constants` comes before the first call."""

    def __init__(self, path: Path, inputs: Sequence[str], outputs: Sequence[str], device: str = "cpu") -> None:
        ops.register()
        check_package(path)
        self.inputs, self.outputs, self.device = tuple(inputs), tuple(outputs), device
        self._ready = False
        try:
            with quietly():
                self._package: Any = torch._inductor.aoti_load_package(str(path))
        except Exception as error:
            told = " ".join(str(error).split())[:300]
            raise EffError(
                "EFF-E174",
                f"torch does not load {path.name}: {type(error).__name__}: {told}",
                hint="a package is for the torch and the kind of CPU that made it (eff show DIR): export it here",
            ) from error

    def constants(self) -> tuple[str, ...]:
        """Return the names of the weights that a call reads."""
        return tuple(self._package.get_constant_fqns())

    def load_constants(self, values: Mapping[str, Tensor]) -> None:
        """Load every weight; raises EFF-E172 where one is missing or the package refuses."""
        names = self.constants()
        if lacking := [name for name in names if name not in values]:
            raise EffError(
                "EFF-E172", f"{len(lacking)} weights are missing, `{lacking[0]}` for example", hint=WEIGHTS_HINT
            )
        try:
            given = {name: values[name].to(self.device) for name in names}
            self._package.load_constants(given, check_full_update=True)
        except Exception as error:
            raise EffError(
                "EFF-E172", f"the weights do not fit: {' '.join(str(error).split())[:300]}", hint=WEIGHTS_HINT
            ) from error
        self._kept = given  # the package reads them where they are
        self._ready = True

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return every output by its name.

        Raises:
            EffError: EFF-E171 before the weights are loaded; EFF-E111 for other inputs, and where the package fails.
        """
        if not self._ready:
            raise EffError("EFF-E171", "the package has no weights yet: a call would crash", hint="load_constants(...)")
        check_inputs(self.inputs, given)
        flat = [given[name].detach().to(self.device) for name in self.inputs]
        try:
            with torch.no_grad():
                found = self._package.loader.run(flat)
        except Exception as error:
            raise EffError(
                "EFF-E111", f"the package fails: {' '.join(str(error).split())[-300:]}", hint=SIZES_HINT
            ) from error
        return {name: x.cpu() for name, x in zip(self.outputs, found, strict=True)}
