"""Compare what an artifact gives with what the model gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effcompile.core.emitter import INPUTS_HINT, Runner
from effcompile.core.errors import EffError


def run(session: Runner, tensors: Sequence[Tensor], outputs: int) -> dict[str, Tensor]:
    """Run an artifact on the tensors of a call.

    Raises:
        EffError: EFF-E110 where it has another number of outputs, EFF-E111 where it does not take the call.
    """
    if len(tensors) != len(session.inputs):
        raise EffError(
            "EFF-E111",
            f"the call has {len(tensors)} tensors, the artifact takes {len(session.inputs)}",
            hint=INPUTS_HINT,
        )
    values = session(dict(zip(session.inputs, tensors, strict=True)))
    if len(values) != outputs:
        raise EffError(
            "EFF-E110",
            f"the export has {len(values)} outputs, the model {outputs}",
            hint="the call has to be the one that was exported (eff show DIR)",
        )
    return values


def errors(
    session: Runner, tensors: Sequence[Tensor], wanted: Sequence[Tensor], real: Tensor | None = None
) -> dict[str, tuple[float, torch.dtype]]:
    """Run an artifact on tensors; return for each output its error and the model's dtype.

    `real` `[batch, tokens]` is given for a decoder with its cache: what a padding token gives has to be numbers.

    Raises:
        EffError: as `run`.
    """
    values = run(session, tensors, len(wanted))
    pairs = [(name, x, exact) for (name, x), exact in zip(values.items(), wanted, strict=True)]
    if real is not None:
        pairs = [(name, _tokens(x, real), _tokens(exact, real)) for name, x, exact in pairs]
    return {name: (_error(x, exact), exact.dtype) for name, x, exact in pairs}


def errors_of_codes(
    session: Runner,
    tensors: Sequence[Tensor],
    follow: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, list[Tensor]]],
    outputs: int,
    real: Tensor,
) -> dict[str, tuple[float, torch.dtype]]:
    """Do the same for a decoder whose cache holds codes: eager follows the codes that the artifact made.

    The error of codes is how far a number is from its code beyond half a step, over the largest code.

    Raises:
        EffError: as `run`.
    """
    values = run(session, tensors, outputs)
    (first, logits), *codes = values.items()
    exact, distances = follow(tensors, [x for _, x in codes])
    found = {first: (_error(_tokens(logits, real), _tokens(exact, real)), exact.dtype)}
    for (name, x), apart in zip(codes, distances, strict=True):
        new = real[:, None, real.shape[1] - apart.shape[2] :, None]
        beyond = torch.where(new, apart - 0.5, 0.0).clamp_min(0)
        levels = 127 if x.dtype == torch.int8 else 7
        found[name] = (float(beyond.max() / levels) if beyond.numel() else 0.0, exact.dtype)
    return found


def _tokens(x: Tensor, real: Tensor) -> Tensor:
    """Return logits `[B, S, V]` or a cache `[B, H, T, D]` with zeros in the place of padding, where numbers stand.

    What lies behind the tokens of a buffer is nobody's, and zeros too.
    """
    if x.dim() == 4:
        real = torch.nn.functional.pad(real, (0, max(0, x.shape[2] - real.shape[1])), value=False)
    if not real.all() and not x.isnan().any():
        kept = real[:, -x.shape[1] :, None] if x.dim() == 3 else real[:, None, :, None]
        return torch.where(kept, x, torch.zeros((), dtype=x.dtype))
    return x


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
