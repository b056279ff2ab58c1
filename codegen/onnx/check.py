"""Compare what an artifact gives with what the model gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effcompile.core.emitter import Runner
from effcompile.core.errors import EffError


def errors(
    session: Runner,
    tensors: Sequence[Tensor],
    wanted: Sequence[Tensor],
    real: Tensor | None = None,
    loose: bool = False,
) -> dict[str, tuple[float, torch.dtype]]:
    """Run an artifact on tensors; return for each output its error and the model's dtype.

    `real` `[batch, tokens]` is given for a decoder with its cache: what a padding token gives has to be numbers, and codes may
    differ by one, or more where the comparison is `loose`.

    Raises:
        EffError: EFF-E110 where they have not the same number of outputs, EFF-E111 where the artifact does not take the call.
    """
    if len(tensors) != len(session.inputs):
        raise EffError("EFF-E111", f"the call has {len(tensors)} tensors, the artifact takes {len(session.inputs)}")
    values = session(dict(zip(session.inputs, tensors, strict=True)))
    if len(values) != len(wanted):
        raise EffError("EFF-E110", f"the export has {len(values)} outputs, the model {len(wanted)}")
    pairs = zip(values.items(), wanted, strict=True)
    if real is None:
        return {n: (_error(x, exact), exact.dtype) for (n, x), exact in pairs}
    cut = [(n, _tokens(x, real), _tokens(exact, real)) for (n, x), exact in pairs]
    return {
        n: (_error(x, exact) if exact.is_floating_point() else _apart(x, exact, loose), exact.dtype)
        for n, x, exact in cut
    }


def _tokens(x: Tensor, real: Tensor) -> Tensor:
    """Return logits `[B, S, V]` or a cache `[B, H, T, D]` with zeros in the place of padding, where numbers stand."""
    if not real.all() and not x.isnan().any():
        kept = real[:, -x.shape[1] :, None] if x.dim() == 3 else real[:, None, :, None]
        return torch.where(kept, x, torch.zeros((), dtype=x.dtype))
    return x


def _apart(codes: Tensor, exact: Tensor, loose: bool) -> float:
    """Return how far codes are apart on average, and unless `loose` none by more than one: a number may lie between two codes."""
    if codes.shape != exact.shape or codes.dtype != exact.dtype:
        return float("inf")
    if codes.dtype == torch.uint8:
        codes, exact = (torch.stack([x & 15, x >> 4]) for x in (codes, exact))
    gap = (codes.int() - exact.int()).abs()
    if not gap.numel():
        return 0.0
    return float(gap.double().mean()) if loose or int(gap.max()) <= 1 else float("inf")


def _error(value: Tensor, exact: Tensor) -> float:
    if value.shape != exact.shape:
        return float("inf")
    if not exact.dtype.is_floating_point:
        return 0.0 if torch.equal(value, exact) else float("inf")
    found, wanted = value.double(), exact.double()
    same = (found == wanted) | (found.isnan() & wanted.isnan())  # infinities and NaN must be where they were
    apart = torch.where(same, 0.0, (found - wanted).abs()).max() if found.numel() else torch.zeros(())
    scale = wanted.abs()[wanted.isfinite()].max() if wanted.isfinite().any() else torch.ones(())
    return float("inf") if apart.isnan() else float(apart / scale.clamp_min(1e-30))
