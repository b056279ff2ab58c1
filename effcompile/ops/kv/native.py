"""Call `cpp/kv_cache.cpp`, compiled once."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from effcompile.ops.native import DTYPES, build


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where they cannot be built; the first call in a cold cache takes seconds."""
    found = build("kv_cache.cpp")
    if found is not None:
        sizes, pointers, whole, real = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
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
    numbers = [batch, heads, depth, v.shape[3], count, *sizes, torch.get_num_threads()]
    numbers += [*k.stride()[:3], *v.stride()[:3]]
    kernels = library()
    assert kernels is not None
    kernels.eff_kv_append(DTYPES[k.dtype], bits, _numbers(numbers), _pointers((k, v, *state)))


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
    length, packed, *rest = sizes
    out = q.new_empty((batch, heads, rows, v.shape[3]))
    lse = torch.empty((batch, heads, rows), dtype=torch.float32)
    kind, strides = 0, [0, 0, 0, 0]
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask if kind == 1 or mask.dtype == torch.float32 else mask.float()
        strides = [0 if extent == 1 else step for extent, step in zip(mask.shape[:3], mask.stride())] + [mask.stride(3)]
    numbers = [batch, heads, k.shape[1], rows, depth, v.shape[3], length, k.shape[2], packed, *rest, kind, int(causal)]
    numbers += [torch.get_num_threads(), *k.stride()[:3], *v.stride()[:3], *strides]
    kernels = library()
    assert kernels is not None
    operands = (q, k, v, mask, out, lse, *state)
    kernels.eff_kv_attention(DTYPES[q.dtype], bits, _numbers(numbers), _pointers(operands), scale, softcap)
    return out, lse


def _numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
