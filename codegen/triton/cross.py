"""Compile kernels for GPUs that are not here, and read back what the binary takes.

Triton brings its assemblers along (ptxas and cuobjdump for NVIDIA, LLVM for AMD), so registers, spills, shared memory and the
kind of matrix instruction of every binary are known on any machine. Line tables are left out: they hold paths.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effcompile.codegen.triton.kernel import AMD, Config, Form, Kernel, architecture
from effcompile.core.errors import EffError

_MATRIX = (
    ("wgmma", "wgmma.mma_async"),
    ("tcgen05", "tcgen05.mma"),
    ("mma", "mma.sync"),
    ("mfma", "v_mfma"),
)


@dataclass(frozen=True)
class Binary:
    """Hold what one binary is and takes.

    `registers` are those of a thread (vector registers on AMD, accumulation registers included); `spills` the bytes a thread
    keeps in local memory (the number of spilled vector registers on AMD); `shared` bytes of shared memory for a program of
    `threads` threads; `matrix` the kinds of matrix instructions in it; `copies` whether tiles come by TMA; `digest` the
    SHA-256 of the binary.
    """

    registers: int
    spills: int
    shared: int
    threads: int
    matrix: tuple[str, ...]
    copies: str
    digest: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**dataclasses.asdict(self), "matrix": list(self.matrix)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Binary:
        """Build the value that `to_json` gave."""
        return cls(**{**data, "matrix": tuple(data["matrix"])})


def version() -> str:
    """Return Triton's version."""
    import triton

    return str(triton.__version__)


@dataclass(frozen=True)
class Built:
    """Hold a compiled kernel: its machine code, the assembler text it was made of, its symbol, and what it takes.

    `parameters` counts what a launch passes: the declared ones and, behind them, pointers to scratch memory that Triton adds.
    `scratch` are the bytes of it that one program needs; no kernel here needs any, so these pointers may be null.
    """

    code: bytes
    text: str
    symbol: str
    parameters: int
    scratch: int
    binary: Binary


def cross_compile(kernel: Kernel, form: Form, config: Config, compute: str) -> Binary:
    """Compile one form of a kernel with one config for a compute word (`sm_90`, `gfx942`) and return what the binary takes.

    Raises:
        EffError: as `build`.
    """
    return build(kernel, form, config, compute).binary


def build(kernel: Kernel, form: Form, config: Config, compute: str) -> Built:
    """Compile one form of a kernel with one config for a compute word; about a second, cached by Triton.

    Raises:
        EffError: EFF-K101 for a chip that no kernel is written for, EFF-K102 where the compiler refuses, with its words.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arch = architecture(compute)
    target = GPUTarget("hip", compute, 64) if arch in AMD else GPUTarget("cuda", int(compute.removeprefix("sm_")), 32)
    types, constants, attributes = signature(kernel, form, config)
    options = {**config.options, "enable_fp_fusion": True}
    try:
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.disable_line_info = True
            done = triton.compile(
                ASTSource(kernel.function, types, constants, attributes), target=target, options=options
            )
    except Exception as error:
        told = " ".join(str(error).split())[-300:]  # Triton quotes the source first and ends with the reason
        where = f"{kernel.name}/{form.name}/{config.name}"
        raise EffError("EFF-K102", f"{where} does not compile for {compute}: {type(error).__name__}: {told}") from error
    amd = arch in AMD
    scratch = int(getattr(done.metadata, "global_scratch_size", 0) or 0)
    text = str(done.asm["amdgcn" if amd else "ptx"])
    return Built(
        code=bytes(done.asm["hsaco" if amd else "cubin"]),
        text=text,
        symbol=str(done.metadata.name),
        parameters=_parameters(text, amd),
        scratch=scratch,
        binary=_read_amd(done) if amd else _read_nvidia(done),
    )


def front_end(kernel: Kernel, form: Form, config: Config, compute: str, ones: tuple[str, ...] = ()) -> str:
    """Return the kernel in Triton's own intermediate form, the parameters `ones` being the constant 1, as a launch makes them."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", int(compute.removeprefix("sm_")), 32)
    types, constants, attributes = signature(kernel, form, config)
    types |= dict.fromkeys(ones, "constexpr")
    names = kernel.parameters()
    attributes = {place: said for place, said in attributes.items() if names[place[0]] not in ones}
    source = ASTSource(kernel.function, types, {**constants, **dict.fromkeys(ones, 1)}, attributes)
    backend, context = make_backend(target), ir.context()
    options = backend.parse_options({**config.options, "enable_fp_fusion": True})
    ir.load_dialects(context)
    backend.load_dialects(context)
    made = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    return str(made)


def signature(
    kernel: Kernel, form: Form, config: Config
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Return (type of every parameter, values of the constexpr ones, attributes by place) as Triton's ASTSource takes them.

    Raises ValueError where the declaration and the jit function disagree: our own fault.
    """
    given = dict(form.types)
    for parameter, shape in config.descriptors:
        given[parameter] = f"tensordesc<{given[parameter].removeprefix('*')}[{', '.join(map(str, shape))}]>"
    constants = {**dict(form.constants), **config.constants}
    names = kernel.parameters()
    if sorted((*given, *constants)) != sorted(names):
        odd = sorted(set(names) ^ {*given, *constants}) or "a parameter given twice"
        raise ValueError(f"{kernel.name}/{form.name}: declaration and function disagree about {odd}")
    types = {name: given.get(name, "constexpr") for name in names}
    attributes: dict[tuple[int], list[list[Any]]] = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in form.aligned
    }
    return types, constants, attributes


def _parameters(text: str, amd: bool) -> int:
    if amd:
        # Hidden arguments of the AMD ABI (`.value_kind: hidden_...`) are not passed by a launch.
        return len(re.findall(r"\.value_kind:\s*(?:by_value|global_buffer)", text))
    entry = text[text.index(".entry") :]
    return len(re.findall(r"\.param\s", entry[: entry.index("{")]))


def _read_nvidia(done: Any) -> Binary:
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(done.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}
    return Binary(
        registers=used["REG"],
        spills=used["STACK"] + used["LOCAL"],
        shared=int(done.metadata.shared),
        threads=32 * int(done.metadata.num_warps),
        matrix=_kinds(done.asm["ptx"]),
        copies="tma" if "cp.async.bulk.tensor" in done.asm["ptx"] else "plain",
        digest=hashlib.sha256(done.asm["cubin"]).hexdigest(),
    )


def _read_amd(done: Any) -> Binary:
    text = done.asm["amdgcn"]
    used = {name: int(number) for name, number in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", text)}
    return Binary(
        registers=used["vgpr_count"],
        spills=used["vgpr_spill_count"],
        shared=int(done.metadata.shared),
        threads=64 * int(done.metadata.num_warps),
        matrix=_kinds(text),
        copies="plain",
        digest=hashlib.sha256(text.encode()).hexdigest(),
    )


def _kinds(text: str) -> tuple[str, ...]:
    return tuple(kind for kind, word in _MATRIX if word in text)
