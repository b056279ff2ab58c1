"""Define `eff::mask_tensor_v1`: the tensor of a proved mask, for kernels that take nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from effcompile.core.expr import BATCH, HEAD, TRUE, axes_of
from effcompile.core.expr_eval import evaluate, from_json
from effcompile.ops.attention import define, grid


def mask_tensor(
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    bias: str,
    soft: str,
    empty_row: str,
    batch: int,
    heads: int,
    rows: int,
    columns: int,
    device: torch.device,
) -> torch.Tensor:
    """Return a mask `[B|1, H|1, Q, K]`: bool (True keeps) where that says all, else float32 to add to the scores.

    A float mask fills with the least float32 where rows without keys average over the `soft` ones, else with -inf.
    """
    predicate = from_json(keep)
    used = _axes(keep, bias, soft)
    extents = (batch if BATCH in used else 1, heads if HEAD in used else 1, rows, columns)
    axes = grid(*extents, device)
    kept = evaluate(predicate, axes, loads, sizes).expand(extents)
    if not bias and empty_row in ("zero", "never"):
        return kept.contiguous()
    added = torch.zeros(extents, device=device)
    if bias:
        added = added + evaluate(from_json(bias), axes, loads, sizes)
    if empty_row != "uniform":
        return added.masked_fill(~kept, -math.inf)
    least = torch.finfo(torch.float32).min
    fill = torch.full((), least, device=device).expand(extents)
    if soft and from_json(soft) != TRUE:
        fill = torch.where(evaluate(from_json(soft), axes, loads, sizes), least, -math.inf)
    return torch.where(kept, added, fill)


def _axes(keep: str, bias: str, soft: str) -> frozenset[int]:
    found: frozenset[int] = frozenset()
    for text in (keep, bias, soft):
        found |= axes_of(from_json(text)) if text else frozenset()
    return found


def _fake(
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    bias: str,
    soft: str,
    empty_row: str,
    batch: int,
    heads: int,
    rows: int,
    columns: int,
    device: torch.device,
) -> torch.Tensor:
    used = _axes(keep, bias, soft)
    dtype = torch.bool if not bias and empty_row in ("zero", "never") else torch.float32
    return torch.empty(
        (batch if BATCH in used else 1, heads if HEAD in used else 1, rows, columns), dtype=dtype, device=device
    )


def register() -> None:
    """Register the op, once."""
    define(
        "eff::mask_tensor_v1",
        "(Tensor[] loads, SymInt[] sizes, str keep, str bias, str soft, str empty_row, SymInt batch, SymInt heads, SymInt rows, "
        "SymInt columns, Device device) -> Tensor",
        mask_tensor,
        _fake,
    )
