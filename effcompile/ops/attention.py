"""Define `eff::attention_v1`: softmax(softcap(q k^T * scale) + bias | mask) v, with the mask as a predicate.

The one form that every idiom of attention is raised to. `keep` and `bias` are expressions (core/expr.py) over (b, h, q, k) whose
slots refer to `loads` and `sizes`; `mask` is the tensor the model built, kept as an operand until a kernel is chosen, so that a
dense fallback is exactly what the model said. Where `keep` is '' the mask is opaque and only the tensor says what is meant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from effcompile.core.expr import TRUE
from effcompile.core.expr_eval import evaluate, from_json
from effcompile.ops.sinks import empty_gate

NAME = "eff::attention_v1"
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, Tensor[] loads, SymInt[] sizes, str keep, str bias, "
    "str soft, str empty_row, float scale, float softcap) -> Tensor"
)


def grid(batch: int, heads: int, q_len: int, k_len: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return the four index tensors `[B,1,1,1] [1,H,1,1] [1,1,Q,1] [1,1,1,K]`."""
    extents = (batch, heads, q_len, k_len)
    return tuple(
        torch.arange(n, device=device).reshape([n if d == place else 1 for d in range(4)])
        for place, n in enumerate(extents)
    )


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    bias: str,
    soft: str,
    empty_row: str,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Compute attention densely.

    q `[B, Hq, Q, D]`, k `[B, Hkv, K, D]`, v `[B, Hkv, K, Dv]`, Hq a multiple of Hkv; sinks `[Hq]`. Returns `[B, Hq, Q, Dv]`.
    An empty row gives zeros, NaN, or the mean of V over the `soft` keys (zeros where it
    has none of those either), as the source of the mask would; a finite sink leaves nothing of it.
    """
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.matmul(q, keys.transpose(-1, -2)).float() * scale
    if q.dtype == torch.float64:
        scores = torch.matmul(q, keys.transpose(-1, -2)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    kept: torch.Tensor | None = None
    axes = grid(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    if keep:
        kept = evaluate(from_json(keep), axes, loads, sizes).expand(scores.shape)
        if bias:
            scores = scores + evaluate(from_json(bias), axes, loads, sizes)
    elif mask is not None and mask.dtype == torch.bool:
        kept = mask.expand(scores.shape)
    elif mask is not None:
        scores = scores + mask
    return finish(scores, kept, values, sinks, empty_row, soft, axes, loads, sizes).to(v.dtype)


def finish(
    scores: torch.Tensor,
    kept: torch.Tensor | None,
    values: torch.Tensor,
    sinks: torch.Tensor | None,
    empty_row: str,
    soft: str,
    axes: Sequence[torch.Tensor],
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
) -> torch.Tensor:
    """Apply mask, softmax and values to dense scores `[B, H, Q, K]`."""
    if kept is not None:
        scores = scores.masked_fill(~kept, -math.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        probs = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    else:
        probs = torch.softmax(scores, -1)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    if empty_row == "uniform":
        even = torch.ones_like(probs)
        if soft and from_json(soft) != TRUE:
            even = even * evaluate(from_json(soft), axes, loads, sizes)
        even = even / even.sum(-1, keepdim=True).clamp(min=1)
        if sinks is not None:
            even = even * empty_gate(sinks, empty_row, scores).to(even.dtype)
        probs = torch.where(empty, even, probs)
    elif empty_row != "nan":
        probs = torch.where(empty, torch.zeros_like(probs), probs)
    return torch.matmul(probs.to(values.dtype), values)


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    bias: str,
    soft: str,
    empty_row: str,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def register() -> None:
    """Register the op, once."""
    define(NAME, SCHEMA, reference, _fake)


def define(name: str, schema: str, body: object, fake: object) -> None:
    """Define one functional op with its body for every device and its fake; a second call does nothing."""
    namespace, short = name.split("::")
    if hasattr(getattr(torch.ops, namespace), short):
        return
    torch.library.define(name, schema, tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.impl(name, "CompositeExplicitAutograd", body)
    torch.library.register_fake(name, fake)
