"""Compile the C++ kernels of this folder once, with TorchInductor's compiler and flags, and call them.

TorchInductor keeps the library on disk, keyed by source, flags and torch version. Where there is no C++ compiler, or where
TorchInductor finds no vector instructions and would build code that is many times slower, the kernels are absent, and their
callers have a composition of torch operations instead.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from importlib import resources

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


_LOCK = threading.Lock()


def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where they cannot be built; the first call in a cold cache takes seconds."""
    with _LOCK:
        return _built()


def prefetch() -> None:
    """Begin to build the kernels beside what the caller does next: TorchInductor's own work leaves a core free most of the time."""
    if not _LOCK.locked() and not _built.cache_info().currsize:
        threading.Thread(target=library, name="eff-native", daemon=True).start()


@functools.cache
def _built() -> ctypes.CDLL | None:
    from torch._inductor import exc
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    if not pick_vec_isa():
        return None
    source = resources.files("effcompile.ops").joinpath("cpp", "attention_blocks.cpp").read_text(encoding="utf-8")
    try:
        found: ctypes.CDLL = CppCodeCache.load(source)
    except (exc.InductorError, exc.CppCompileError, exc.InvalidCxxCompiler, OSError, RuntimeError):
        return None
    found.eff_attention_blocks.restype = None
    found.eff_attention_blocks.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float]
    return found


def call_attention_blocks(
    dtype: torch.dtype, sizes: Sequence[int], operands: Sequence[torch.Tensor | None], scale: float
) -> None:
    """Run `eff_attention_blocks`; sizes and operands are in the order that the C++ source gives."""
    kernels = library()
    assert kernels is not None
    numbers = (ctypes.c_int64 * len(sizes))(*sizes)
    pointers = (ctypes.c_void_p * len(operands))(*(None if t is None else t.data_ptr() for t in operands))
    kernels.eff_attention_blocks(DTYPES[dtype], numbers, pointers, scale)
