"""Define `eff::moe_v1`: y[t] = sum over j of weights[t, j] * F_e(x[t]), e = ids[t, j]: the experts of a layer, after routing.

F_e(x) = W2_e gate(W1_e x + b1_e) + b2_e. The one form that every spelling of a mixture of experts is raised to. An id outside
[0, E) contributes nothing: its row is never multiplied, so that a NaN there reaches nobody (expert parallelism marks tokens of
other ranks so). On CPU the compiled kernel of `native_moe.py` runs where it can. `eff::moe_blocks_v1` means the same and is the op
of the Triton kernels. Papers: arXiv:1701.06538, arXiv:2101.03961.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.core.experts import ACTS, LAYOUTS, ExpertsCall
from effcompile.ops import native_moe
from effcompile.ops.attention import define

NAME, BLOCKS = "eff::moe_v1", "eff::moe_blocks_v1"
SCHEMA = (
    "(Tensor x, Tensor ids, Tensor weights, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str act, str layout, bool transposed, "
    "str side, float alpha, float beta, float limit) -> Tensor"
)


def gated(g: Tensor, act: str, layout: str, alpha: float, beta: float, limit: float) -> Tensor:
    """Return what the second product gets, of what the first gave `[..., 2 I]` or, without a gate, `[..., I]`.

    Computed in float32 at least, returned in g's dtype.
    """
    kind = g.dtype
    g = g.to(torch.promote_types(kind, torch.float32))
    up: Tensor | None = None
    if layout == "concat":
        g, up = g.chunk(2, -1)
    elif layout == "interleaved":
        g, up = g[..., ::2], g[..., 1::2]
    if limit:
        g = g.clamp(max=limit)
    out = activated(g, act, alpha)
    if up is not None:
        up = up.clamp(-limit, limit) if limit else up
        out = out * (up + beta if beta else up)
    return out.to(kind)


def activated(g: Tensor, act: str, alpha: float) -> Tensor:
    """Return act(g); of silu the sigmoid is of alpha * g."""
    if act == "silu":
        return F.silu(g) if alpha == 1 else g * torch.sigmoid(alpha * g)
    if act == "gelu":
        return F.gelu(g)
    if act == "gelu_tanh":
        return F.gelu(g, approximate="tanh")
    if act == "relu":
        return F.relu(g)
    return F.relu(g).square() if act == "relu2" else g


def product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Return rows x `[n, in]` times one expert's weight `[out, in]`, or `[in, out]` where it is transposed, plus its bias."""
    y = x @ weight if transposed else x @ weight.t()
    return y if bias is None else y + bias


def moe(*operands: Any) -> Tensor:
    """Compute the experts of a layer; operands are those of `ExpertsCall`.

    x `[T, H]`, ids `[T, k]` (integers), weights `[T, k]` (any float), w1 `[E, 2 I, H]` (or `[E, I, H]` without a gate), w2
    `[E, H, I]`; transposed `[E, H, 2 I]` and `[E, I, H]`; biases `[E, 2 I]` and `[E, H]`. Returns `[T, H]` in x's dtype, summed in
    float32 at least, in the order of the experts.

    Raises:
        EffError: EFF-M201 for shapes or dtypes that do not fit each other, EFF-M202 for an unknown gate.
    """
    given: ExpertsCall[Tensor] = ExpertsCall(*operands)
    check(given)
    if native_moe.takes(given.x, given.w1, given.b1, given.w2, given.b2):
        return native_moe.run(given)
    return composed(given)


def composed(given: ExpertsCall[Tensor]) -> Tensor:
    """Compute the same with torch operations, one expert after the other."""
    x, ids, w1, b1, w2, b2 = given.x, given.ids, given.w1, given.b1, given.w2, given.b2
    kind = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape, dtype=kind, device=x.device)
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat.clamp(-1, w1.shape[0]) + 1, minlength=w1.shape[0] + 2)[:-1].tolist()
    start = counts[0]  # ids below 0 come first
    for expert, count in enumerate(counts[1:]):
        slots, start = order[start : start + count], start + count
        if not count:
            continue
        tokens = slots // ids.shape[1]
        share = given.weights.reshape(-1)[slots, None].to(kind)
        rows = x[tokens] if given.side == "out" else (x[tokens] * share).to(x.dtype)
        inner = product(rows, w1[expert], None if b1 is None else b1[expert], given.transposed)
        inner = gated(inner, given.act, given.layout, given.alpha, given.beta, given.limit)
        y = product(inner, w2[expert], None if b2 is None else b2[expert], given.transposed).to(kind)
        out.index_add_(0, tokens, y * share if given.side == "out" else y)
    return out.to(x.dtype)


def check(given: ExpertsCall[Tensor]) -> None:
    """Raise EFF-M201 unless the operands fit each other, EFF-M202 unless gate and side are known.

    Symbolic sizes are not compared.
    """
    x, ids, weights, w1, b1, w2, b2 = given.x, given.ids, given.weights, given.w1, given.b1, given.w2, given.b2
    act, layout, transposed, side = given.act, given.layout, given.transposed, given.side
    if act not in ACTS or layout not in LAYOUTS or side not in ("in", "out"):
        raise EffError("EFF-M202", f"no gate `{act} {layout}` with weights on the {side}put side")
    dims = (x.dim(), ids.dim(), weights.dim(), w1.dim(), w2.dim())
    if dims != (2, 2, 2, 3, 3):
        raise EffError("EFF-M201", f"operands of ranks {dims} where (2, 2, 2, 3, 3) are needed")
    experts, wide, hidden = w1.shape if not transposed else (w1.shape[0], w1.shape[2], w1.shape[1])
    inner = wide // 2 if layout != "none" else wide
    second = (experts, inner, hidden) if transposed else (experts, hidden, inner)
    wanted = [
        ("x", x, (x.shape[0], hidden)),
        ("weights", weights, ids.shape),
        ("ids", ids, (x.shape[0], ids.shape[1])),
        ("w2", w2, second),
        ("b1", b1, (experts, wide)),
        ("b2", b2, (experts, hidden)),
    ]
    for name, tensor, shape in wanted:
        if tensor is not None and (tensor.dim() != len(shape) or any(map(_differ, tensor.shape, shape))):
            raise EffError("EFF-M201", f"{name} is {list(tensor.shape)} where {list(shape)} is needed", hint=_HINT)
    if layout != "none" and wide % 2:
        raise EffError("EFF-M201", f"w1 gives {wide} numbers, which are not two halves", hint=_HINT)
    if _above(ids.shape[1], experts):
        raise EffError("EFF-M201", f"{ids.shape[1]} experts for each token of {experts}", hint="top_k <= experts")
    kinds = {t.dtype for t in (x, w1, b1, w2, b2) if t is not None}
    if len(kinds) > 1 or not x.is_floating_point() or not weights.is_floating_point() or ids.is_floating_point():
        raise EffError(
            "EFF-M201",
            f"x, weights and biases of experts in {sorted(map(str, kinds))}, ids in {ids.dtype}",
            hint="one dtype for x and experts, integers for ids",
        )


_HINT = "x [T, H], ids and weights [T, k], w1 [E, 2 I, H], w2 [E, H, I]; transposed [E, H, 2 I] and [E, I, H]"


def _differ(a: int, b: int) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a != b


def _above(a: int, b: int) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a > b


def _fake(*operands: Any) -> Tensor:
    given: ExpertsCall[Tensor] = ExpertsCall(*operands)
    check(given)
    return given.x.new_empty(given.x.shape)


def register() -> None:
    """Register both ops, once."""
    for name in (NAME, BLOCKS):
        define(name, SCHEMA, moe, _fake)
