"""Define `eff::moe_quantized_v1`: the experts of `eff::moe_v1` with weights in 8 bits, int8 or floats (e4m3), and scales.

A weight is code * scale. Of W `[E, out, in]` a scale holds for `span_out` outputs by `span_in` inputs: (1, 0), a scale for every
output and all its inputs, or (128, 128) as in DeepSeek-V3's checkpoints (arXiv:2412.19437). Tokens and sums are as in
`eff::moe_v1`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.core.experts import ExpertsCall
from effcompile.ops import moe as plain
from effcompile.ops.attention import define

NAME = "eff::moe_quantized_v1"
SCHEMA = (
    "(Tensor x, Tensor ids, Tensor weights, Tensor w1, Tensor s1, Tensor? b1, Tensor w2, Tensor s2, Tensor? b2, int span_out, "
    "int span_in, str act, str layout, bool transposed, str side, float alpha, float beta, float limit) -> Tensor"
)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest code of each dtype that weights may have."""


def quantize(
    w: Tensor, transposed: bool = False, dtype: torch.dtype = torch.int8, span_out: int = 1, span_in: int = 0
) -> tuple[Tensor, Tensor]:
    """Round weights `[E, out, in]` (`[E, in, out]` where transposed); return (codes in that layout, scales).

    Scales are float32 `[E, ceil(out / span_out), ceil(in / span_in)]`, of all inputs where span_in is 0: the largest weight of a
    span becomes the largest code.
    """
    logical = (w.transpose(1, 2) if transposed else w).float()
    _, outputs, inputs = logical.shape
    rows = torch.arange(outputs, device=w.device) // span_out
    columns = torch.arange(inputs, device=w.device) // (span_in or max(inputs, 1))
    padding = (0, -inputs % (span_in or max(inputs, 1)), 0, -outputs % span_out)
    spans = F.pad(logical.abs(), padding).unflatten(2, (-1, span_in or max(inputs, 1))).unflatten(1, (-1, span_out))
    most = spans.amax((2, 4))
    scales = torch.where(most > 0, most / LARGEST[dtype], 1.0)
    codes = logical / scales[:, rows][:, :, columns]
    codes = codes.round().clamp(-127, 127) if dtype == torch.int8 else codes.clamp(-448, 448)
    codes = codes.to(dtype)
    return codes.transpose(1, 2).contiguous() if transposed else codes, scales


def dequantize(
    codes: Tensor, scales: Tensor, transposed: bool, span_out: int, span_in: int, dtype: torch.dtype
) -> Tensor:
    """Return the weights that codes and scales stand for, in the codes' layout."""
    logical = codes.transpose(1, 2) if transposed else codes
    rows = torch.arange(logical.shape[1], device=codes.device) // span_out
    columns = torch.arange(logical.shape[2], device=codes.device) // (span_in or max(logical.shape[2], 1))
    w = logical.to(dtype) * scales.to(dtype)[:, rows][:, :, columns]
    return w.transpose(1, 2) if transposed else w


def moe(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    s1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    s2: Tensor,
    b2: Tensor | None,
    span_out: int,
    span_in: int,
    act: str,
    layout: str,
    transposed: bool,
    side: str,
    alpha: float,
    beta: float,
    limit: float,
) -> Tensor:
    """Compute the experts of a layer with weights in 8 bits; shapes as `eff::moe_v1` has them, scales as `quantize` gives them.

    Raises:
        EffError: EFF-M201 for shapes or dtypes that do not fit each other, EFF-M202 for an unknown gate.
    """
    check(x, ids, weights, w1, s1, b1, w2, s2, b2, span_out, span_in, act, layout, transposed, side)
    kind = torch.promote_types(x.dtype, torch.float32)
    first, second = (dequantize(w, s, transposed, span_out, span_in, kind) for w, s in ((w1, s1), (w2, s2)))
    biases = [None if b is None else b.to(kind) for b in (b1, b2)]
    gate = (act, layout, transposed, side, alpha, beta, limit)
    return plain.composed(ExpertsCall(x.to(kind), ids, weights, first, biases[0], second, biases[1], *gate)).to(x.dtype)


def check(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    s1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    s2: Tensor,
    b2: Tensor | None,
    span_out: int,
    span_in: int,
    act: str,
    layout: str,
    transposed: bool,
    side: str,
) -> None:
    """Raise EFF-M201 unless the operands fit each other, EFF-M202 unless gate and side are known."""
    if {w1.dtype, w2.dtype} - set(LARGEST) or w1.dtype != w2.dtype:
        raise EffError("EFF-M201", f"weights in {w1.dtype} and {w2.dtype}", hint="int8 or float8_e4m3fn, both alike")
    if span_out < 1 or span_in < 0:
        raise EffError("EFF-M201", f"scales of {span_out} outputs by {span_in} inputs", hint="(1, 0) or (128, 128)")
    shapes = [torch.empty(w.shape, dtype=x.dtype, device="meta") for w in (w1, w2)]
    gate = (act, layout, transposed, side, 1.0, 0.0, 0.0)
    plain.check(ExpertsCall(x, ids, weights, shapes[0], b1, shapes[1], b2, *gate))
    for name, w, scales in (("s1", w1, s1), ("s2", w2, s2)):
        outputs, inputs = (w.shape[2], w.shape[1]) if transposed else (w.shape[1], w.shape[2])
        wanted = (w.shape[0], -(-outputs // span_out), -(-inputs // span_in) if span_in else 1)
        if tuple(scales.shape) != wanted:
            raise EffError("EFF-M201", f"{name} is {list(scales.shape)} where {list(wanted)} is needed")


def _fake(x: Tensor, *others: object) -> Tensor:
    return x.new_empty(x.shape)


def register() -> None:
    """Register the op, once."""
    define(NAME, SCHEMA, moe, _fake)
