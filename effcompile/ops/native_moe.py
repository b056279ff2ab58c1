"""Call the kernel of `cpp/moe.cpp`: the experts of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.core.experts import ACTS
from effcompile.ops import native

_LAYOUTS = ("none", "concat", "interleaved")  # numbered as in C++


def takes(*tensors: Tensor | None) -> bool:
    """Tell whether the compiled kernel runs on these tensors: on CPU, in one dtype that it knows."""
    return native.runs(native.EXPERTS, *(t for t in tensors if t is not None))


def run(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: str,
    layout: str,
    transposed: bool,
    side: str,
    alpha: float,
    beta: float,
    limit: float,
) -> Tensor:
    """Run `eff_moe` on the operands of `eff::moe_v1`. A weight whose rows are not dense is copied."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    w1, w2 = native.dense_rows(w1), native.dense_rows(w2)
    x, share = x.contiguous(), weights.to(torch.float32).contiguous()
    ids = ids.to(torch.int64).contiguous()
    b1, b2 = (None if b is None else b.contiguous() for b in (b1, b2))
    inner = w2.shape[1 if transposed else 2]
    sizes = [x.shape[0], ids.shape[1], w1.shape[0], x.shape[1], inner, ACTS.index(act), _LAYOUTS.index(layout)]
    sizes += [side == "in", transposed, torch.get_num_threads(), *w1.stride()[:2], *w2.stride()[:2]]
    native.call(native.EXPERTS, "eff_moe", x.dtype, sizes, (x, ids, share, w1, b1, w2, b2, out), alpha, beta, limit)
    return out
