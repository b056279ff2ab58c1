"""Declare a Triton kernel: its function, its compile-time forms, and its configs for each architecture.

A *form* fixes what the data fixes (dtypes, head dimensions, which masks are there); a *config* fixes what tuning fixes (tile sizes,
warps, pipeline stages). Together they name one binary per architecture. A launch takes the first config of its form; a benchmark
may time them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from effcompile.core.errors import EffError

Constant = int | float | bool | str | None

NVIDIA = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx942", "gfx950")
ARCHITECTURES = (*NVIDIA, *AMD)
"""What every kernel is compiled for in the tests."""

_RELATIVES = {"sm_86": "sm_89", "sm_87": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120"}


def architecture(compute: str) -> str:
    """Return which of `ARCHITECTURES` a chip is tuned as: itself, or the relative with its matrix units and its shared memory.

    Raises:
        EffError: EFF-K101 for a chip that no kernel is written for.
    """
    found = _RELATIVES.get(compute, compute)
    if found not in ARCHITECTURES:
        known = ", ".join((*ARCHITECTURES, *_RELATIVES))
        raise EffError("EFF-K101", f"no Triton kernel is tuned for {compute}; known: {known}", hint="eff targets")
    return found


@dataclass(frozen=True)
class Config:
    """Say how one launch is cut: constexpr tile sizes by parameter name, warps per program, stages of the load pipeline.

    `descriptors` pairs the parameters that are TMA descriptors, not pointers, with the shape of the tile that one load brings.
    """

    tiles: tuple[tuple[str, Constant], ...]
    warps: int = 4
    stages: int = 2
    descriptors: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def name(self) -> str:
        """Return the config in one word, for tables: `M128,N64,w8,s3`."""
        tiles = [f"{name.removeprefix('BLOCK_')}{int(value or 0)}" for name, value in self.tiles]
        return ",".join((*tiles, f"w{self.warps}", f"s{self.stages}"))

    @property
    def constants(self) -> dict[str, Constant]:
        """Return the tile sizes by parameter name."""
        return dict(self.tiles)

    @property
    def options(self) -> dict[str, int]:
        """Return what a launch and `torch.library.wrap_triton` take as keywords."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Form:
    """Fix what the data fixes.

    `types` pairs each runtime parameter with Triton's word for its type (`*bf16`, `i32`, `fp32`); `constants` pairs the constexpr
    parameters that no config fixes with their values; `aligned` names the runtime parameters that are multiples of 16, which Triton
    finds out by itself at a launch.
    """

    name: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Constant], ...]
    aligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kernel:
    """Hold one jit function with the forms that are tested and its configs, the default first."""

    name: str
    function: Any
    forms: Callable[[str], Sequence[Form]]
    configs: Callable[[Form, str], Sequence[Config]]

    def parameters(self) -> tuple[str, ...]:
        """Return the parameter names of the jit function, in order."""
        return tuple(self.function.arg_names)

    def form(self, name: str, arch: str) -> Form:
        """Return the form called `name`."""
        (found,) = (form for form in self.forms(arch) if form.name == name)
        return found


WORDS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
"""Triton's word for each dtype that the kernels read."""


def pieces(width: int, least: int = 16) -> tuple[int, int]:
    """Cut a head dimension into two powers of two, the second 0 where one is enough.

    Triton's tiles are powers of two. 72 becomes 64 + 16, 80 becomes 64 + 16, 96 becomes 64 + 32 and 192 becomes 128 + 64,
    where one tile would be 128, 128, 128 and 256 wide. No piece is below `least`, the depth of a matrix instruction: 16, or
    32 for bytes.
    """
    first = max(least, 1 << (width.bit_length() - 1))
    if first >= width:
        return first, 0
    rest = max(least, 1 << (width - first - 1).bit_length())
    return (first * 2, 0) if rest >= first else (first, rest)
