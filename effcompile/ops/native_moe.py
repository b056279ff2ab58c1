"""Call the kernel of `cpp/moe.cpp`: the experts of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.core.experts import ACTS, ExpertsCall
from effcompile.ops import native

FEW_ROWS = 512
"""Rows of tokens up to which `add_swiglu` is taken: on Zen 4 it takes 0.5 to 0.7 of the time of three products of the BLAS."""
_LAYOUTS = ("none", "concat", "interleaved")  # numbered as in C++


def takes(*tensors: Tensor | None) -> bool:
    """Tell whether the compiled kernel runs on these tensors: on CPU, in one dtype that it knows."""
    return native.runs(native.EXPERTS, *(t for t in tensors if t is not None))


def run(given: ExpertsCall[Tensor]) -> Tensor:
    """Run `eff_moe` on the operands of `eff::moe_v1`. A weight is read as it lies, by rows or by columns; others are copied."""
    x, transposed = given.x, given.transposed
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    inner = given.w2.shape[1 if transposed else 2]
    (w1, turned1), (w2, turned2) = _as_it_lies(given.w1, transposed), _as_it_lies(given.w2, transposed)
    x, share = x.contiguous(), given.weights.to(torch.float32).contiguous()
    ids = given.ids.to(torch.int64).contiguous()
    b1, b2 = (None if b is None else b.contiguous() for b in (given.b1, given.b2))
    sizes = [x.shape[0], ids.shape[1], w1.shape[0], x.shape[1], inner]
    sizes += [ACTS.index(given.act), _LAYOUTS.index(given.layout), given.side == "in"]
    sizes += [turned1, turned2, torch.get_num_threads(), *w1.stride()[:2], *w2.stride()[:2], 0]
    operands = (x, ids, share, w1, b1, w2, b2, out, None)
    native.call(native.EXPERTS, "eff_moe", x.dtype, sizes, operands, given.alpha, given.beta, given.limit)
    return out


def adds(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> bool:
    """Tell whether `add_swiglu` runs on these tensors: float32 on CPU, weights with dense rows, those of gate and up alike."""
    dense = all(t.stride(-1) == 1 for t in (gate, up, down)) and gate.stride() == up.stride()
    return x.dtype == torch.float32 and dense and takes(x, gate, up, down)


def add_swiglu(out: Tensor, x: Tensor, ids: Tensor, share: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> None:
    """Add share[t, j] * down_e(silu(gate_e x[t]) * (up_e x[t])), e = ids[t, j], to out[t]; ids outside [0, E) add nothing.

    out and x `[T, H]`, ids (int64) and share (float32) `[T, k]`, all contiguous; gate and up `[E, I, H]` with
    equal strides, down `[E, H, I]`.
    """
    sizes = [x.shape[0], ids.shape[1], gate.shape[0], x.shape[1], gate.shape[1], ACTS.index("silu")]
    sizes += [_LAYOUTS.index("concat"), 0, 0, 0, torch.get_num_threads(), *gate.stride()[:2], *down.stride()[:2], 1]
    operands = (x, ids, share, gate, None, down, None, out, up)
    native.call(native.EXPERTS, "eff_moe", x.dtype, sizes, operands, 1.0, 0.0, 0.0)


def _as_it_lies(weight: Tensor, transposed: bool) -> tuple[Tensor, bool]:
    """Return a weight with dense rows, and whether it is `[E, in, out]` then."""
    turned = weight.transpose(1, 2)
    if weight.stride(2) != 1 and turned.stride(2) == 1:
        return turned, not transposed
    return native.dense_rows(weight), transposed
