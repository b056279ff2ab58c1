"""Call `cpp/kv_cache.cpp`, compiled once."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from effcompile.ops.native import DTYPES, build

_LOCK = threading.Lock()


def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where they cannot be built; the first call in a cold cache takes seconds."""
    with _LOCK:
        return _built()


def prefetch() -> None:
    """Begin to build the kernels beside what the caller does next: a prompt is read before the first token is appended."""
    if not _LOCK.locked() and not _built.cache_info().currsize:
        threading.Thread(target=library, name="eff-native-kv", daemon=True).start()


@functools.cache
def _built() -> ctypes.CDLL | None:
    found = build("kv_cache.cpp")
    if found is not None:
        sizes, pointers, whole, real = ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_float
        found.eff_kv_attention.restype = found.eff_kv_append.restype = None
        found.eff_kv_attention.argtypes = [whole, whole, sizes, pointers, real, real]
        found.eff_kv_append.argtypes = [whole, whole, sizes, pointers]
    return found


def takes(*tensors: Tensor) -> bool:
    """Tell whether the compiled kernels run on these tensors: on CPU, in one dtype that they know."""
    first = tensors[0]
    alike = all(x.device.type == "cpu" and x.dtype == first.dtype for x in tensors)
    return alike and first.dtype in DTYPES and library() is not None


def rows_dense(x: Tensor) -> Tensor:
    """Return the tensor with elements of its last dimension side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def append(bits: int, k: Tensor, v: Tensor, sizes: Sequence[int], state: Sequence[Tensor | None]) -> None:
    """Run `eff_kv_append`: sizes [length, packed, packed after, capacity, group, residual]; state in the order of use."""
    k, v = rows_dense(k), rows_dense(v)
    batch, heads, count, depth = k.shape
    numbers = _APPEND.pack(
        batch, heads, depth, v.shape[3], count, *sizes, torch.get_num_threads(), *k.stride()[:3], *v.stride()[:3]
    )
    kernels = library()
    assert kernels is not None
    kernels.eff_kv_append(DTYPES[k.dtype], bits, numbers, _pointers((k, v, *state)))


def attend(
    bits: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sizes: Sequence[int],
    state: Sequence[Tensor | None],
    causal: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Run `eff_kv_attention`: sizes [length, packed, capacity, group, residual]; returns output and LSE."""
    q, k, v = q.contiguous(), rows_dense(k), rows_dense(v)
    batch, heads, rows, depth = q.shape
    length, packed, capacity, group, residual = sizes
    width = v.shape[3]
    out = torch.empty((batch, heads, rows, width), dtype=q.dtype)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32)
    kind, strides = 0, _NO_MASK
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask if kind == 1 or mask.dtype == torch.float32 else mask.float()
        a, b, c, d = mask.stride()
        strides = (a if mask.shape[0] > 1 else 0, b if mask.shape[1] > 1 else 0, c if mask.shape[2] > 1 else 0, d)
    # fmt: off
    numbers = _ATTEND.pack(
        batch, heads, k.shape[1], rows, depth, width, length, k.shape[2], packed, capacity, group, residual, kind, causal,
        torch.get_num_threads(), *k.stride()[:3], *v.stride()[:3], *strides,
    )
    # fmt: on
    kernels = library()
    assert kernels is not None
    kernels.eff_kv_attention(
        DTYPES[q.dtype], bits, numbers, _pointers((q, k, v, mask, out, lse, *state)), scale, softcap
    )
    return out, lse


# Packed by struct: arrays of ctypes take longer to fill than a short attention takes.
_APPEND, _ATTEND, _NO_MASK = struct.Struct("=18q"), struct.Struct("=25q"), (0, 0, 0, 0)


def _pointers(tensors: Sequence[Tensor | None]) -> bytes:
    return struct.pack(f"={len(tensors)}Q", *(0 if t is None else t.data_ptr() for t in tensors))
