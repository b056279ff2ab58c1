"""Compile the C++ kernels of this folder, with TorchInductor's compiler and flags, and call them.

A source becomes a library when one of its kernels is first needed. TorchInductor keeps it on disk, keyed by source, flags and torch
version. Where there is no C++ compiler, or where TorchInductor finds no vector instructions and would build code that is many times
slower, the kernels are absent, and their callers have a composition of torch operations instead.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
import warnings
from collections.abc import Iterable, Sequence
from importlib import resources

import torch

from effcompile.core.processor import marked

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BLOCKS, SCORES, PAGES, PROBES, CACHES = "attention_blocks", "block_scores", "pages", "probes", "kv_cache"
EXPERTS, ROWS, CODEBOOK = "moe", "linear_rows", "codebook"
KERNELS = {
    BLOCKS: {"eff_attention_blocks": 1},
    SCORES: {"eff_antidiagonal_mass": 1, "eff_top_cdf": 1},
    PAGES: {"eff_choose_pages": 1, "eff_page_attention": 1},
    PROBES: {"eff_probe": 1, "eff_block_means": 1},
    CACHES: {"eff_kv_attention": 3, "eff_kv_append": 0},
    EXPERTS: {"eff_moe": 3},
    ROWS: {"eff_linear_rows": 0},
    CODEBOOK: {"eff_codebook": 0},
}
"""The kernels of each source, and how many floats they take behind dtype, sizes and operands."""
_FILES = {
    BLOCKS: ("tiles.h", "amx.h", "tiles_amx.h", "attention_blocks.cpp"),
    SCORES: ("tiles.h", "amx.h", "tiles_amx.h", "block_scores.cpp"),
    CACHES: ("codes.h", "kv_products.h", "kv_forms.h", "kv_problem.h", "kv_attention.cpp", "kv_append.cpp"),
    ROWS: ("linear_rows.cpp",),
    EXPERTS: ("amx.h", "moe_tiles.h", "moe_pairs.h", "moe_rows.h", "moe.cpp"),
}
"""The files of a source in `cpp/` behind `registers.h`, where they are not `tiles.h` and one of its own name."""
_JOINED = {
    EXPERTS: ("moe_op.cpp", "eff_moe_join", "eff_moe"),
    ROWS: ("linear_rows_op.cpp", "eff_linear_rows_join", "eff_linear_rows"),
}
"""Sources whose kernel torch's dispatcher calls without Python in between: a file that is built with torch's headers, the function
in it to call, and the kernel whose address that gets. Where it cannot be built the op's body in Python calls the kernel."""
_LOCK = threading.Lock()


def library(source: str = BLOCKS) -> ctypes.CDLL | None:
    """Return the compiled kernels of a source, or None where they cannot be built; the first call in a cold cache takes seconds."""
    with _LOCK:
        return _built(source)


def runs(source: str, *operands: torch.Tensor) -> bool:
    """Tell whether the kernels of a source run on tensors: all on the CPU, of a dtype that the kernels know."""
    first = operands[0].dtype
    able = first in DTYPES and all(x.device.type == "cpu" and x.dtype == first for x in operands)
    return able and library(source) is not None


def prefetch(sources: Iterable[str] = (BLOCKS,)) -> None:
    """Begin to build kernels beside what the caller does next: TorchInductor's own work leaves a core free most of the time."""
    wanted = tuple(sources)

    def build() -> None:
        for source in wanted:
            library(source)

    if wanted and not _LOCK.locked() and _built.cache_info().currsize < len(KERNELS):
        threading.Thread(target=build, name="eff-native", daemon=True).start()


@functools.cache
def _built(source: str) -> ctypes.CDLL | None:
    found = build("registers.h", *_FILES.get(source, ("tiles.h", f"{source}.cpp")))
    if found is None:
        return None
    for name, floats in KERNELS[source].items():
        kernel = getattr(found, name)
        kernel.restype = None
        kernel.argtypes = [ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p, *[ctypes.c_float] * floats]
    if source in _JOINED:
        file, join, name = _JOINED[source]
        if (way := build(file, headers=True)) is not None:
            getattr(way, join)(ctypes.cast(getattr(found, name), ctypes.c_void_p))
    return found


def build(*files: str, headers: bool = False) -> ctypes.CDLL | None:
    """Compile and load files of `cpp/`, joined to one source; None where that cannot be done well. `headers`: linked with torch.

    Warns where the compiler refuses the source: the compositions that stand in are right, but slower.
    """
    from torch._inductor import exc
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    if not pick_vec_isa():
        return None
    folder = resources.files("effcompile.ops").joinpath("cpp")

    class Linked(CppCodeCache):
        cpp_compile_command_flags = {"include_pytorch": True}  # noqa: RUF012

    try:
        source = marked("\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in files))
        return (Linked if headers else CppCodeCache).load(source)  # type: ignore[no-any-return]
    except exc.InvalidCxxCompiler:
        return None
    except (exc.InductorError, exc.CppCompileError, OSError, RuntimeError) as error:
        text = " ".join(str(error).split())[-400:]
        warnings.warn(f"effcompile: {files[-1]} could not be compiled, slower code stands in: {text}", stacklevel=2)
        return None


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x `[..., D]` with a dense last dimension, which is all that the kernels ask of a layout."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def call(
    source: str,
    kernel: str,
    dtype: torch.dtype,
    sizes: Sequence[int],
    operands: Sequence[torch.Tensor | None],
    *numbers: float,
) -> None:
    """Run a kernel; sizes and operands are in the order that its C++ source gives."""
    kernels = library(source)
    assert kernels is not None
    # Packed by struct: arrays of ctypes take longer to fill than a short attention takes.
    packed = struct.pack(f"={len(sizes)}q", *sizes)
    pointers = struct.pack(f"={len(operands)}Q", *(0 if t is None else t.data_ptr() for t in operands))
    getattr(kernels, kernel)(DTYPES[dtype], packed, pointers, *numbers)
