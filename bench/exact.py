"""Check long attention without computing it whole: some rows of some heads, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Hold the rows that are checked, their float64 output `[N, Dv]` and LSE `[N]`, and the error that is allowed.

    `places` are (batch row, head, query) `[N, 3]`. An arm may be twice as far off as `plain`, the error of the products and
    the softmax in the dtype of the operands, taken in that dtype step by step; the floor is a unit in the last place of the
    largest value.
    """

    places: Tensor
    out: Tensor
    lse: Tensor
    plain: float
    floor: float

    def numerics(self, out: Tensor) -> dict[str, Any]:
        """Return the largest error of an output `[B, H, Q, Dv]` over the sampled rows, and whether it is allowed."""
        error = float((self._of(out).double() - self.out).abs().max())
        allowed = 2 * self.plain + self.floor
        # NaN compares false, so it is never within.
        return {
            "error": _short(error),
            "allowed": _short(allowed),
            "plain": _short(self.plain),
            "within": error <= allowed,
        }

    def lse_error(self, lse: Tensor) -> float:
        """Return the largest error of an LSE `[B, H, Q]` over the sampled rows; rows without keys must be -inf in both."""
        got = self._of(lse).double()
        if not torch.equal(got == -math.inf, self.lse == -math.inf):
            return math.inf
        there = self.lse != -math.inf
        return float((got - self.lse)[there].abs().max()) if there.any() else 0.0

    def _of(self, x: Tensor) -> Tensor:
        b, h, i = self.places.unbind(1)
        return x[b, h, i]


def sample(q: Tensor, k: Tensor, v: Tensor, keep: Any, scale: float, rows: int = 96) -> Sample:
    """Compute sampled rows of softmax(scale q k^T | keep) v.

    q `[B, Hq, Q, D]`, k and v `[B, Hkv, K, D]`; `keep(b, h, i)` takes index tensors `[N]` and returns bool `[N, K]`. A third
    of the rows are the last ones, the rest are random (seeded) over all batch rows and heads.
    """
    batch, heads, length = q.shape[:3]
    draw = torch.Generator().manual_seed(0)
    places = torch.stack([torch.randint(0, size, (rows,), generator=draw) for size in (batch, heads, length)], 1)
    places[: rows // 3, 2] = length - 1 - torch.arange(rows // 3) % length
    places = places.to(q.device)
    b, h, i = places.unbind(1)
    kept = keep(b, h, i)
    owner = h // (heads // k.shape[1])
    outs, logs, errors = [], [], []
    for n in range(rows):  # a row at a time: all keys in float64 at once would be gigabytes
        query, key, value = q[b[n], h[n], i[n]], k[b[n], owner[n]], v[b[n], owner[n]]
        scores = ((key.double() @ query.double()) * scale).masked_fill(~kept[n], -math.inf)
        lse = torch.logsumexp(scores, 0)
        weights = torch.exp(scores - (0 if lse == -math.inf else lse))
        outs.append(weights @ value.double())
        logs.append(lse)
        stepwise = torch.softmax(((key @ query) * scale).float().masked_fill(~kept[n], -math.inf), 0).nan_to_num(0.0)
        errors.append(((stepwise.to(value.dtype) @ value).double() - outs[-1]).abs().max())
    floor = torch.finfo(v.dtype).eps * float(v.abs().max())
    return Sample(places, torch.stack(outs), torch.stack(logs), float(torch.stack(errors).max()), floor)


def banded(length: int, keys: int, right: int, left: int = -1) -> Any:
    """Return the `keep` of a band aligned to the bottom right."""

    def keep(b: Tensor, h: Tensor, i: Tensor) -> Tensor:
        columns, place = torch.arange(keys, device=i.device), (i + keys - length)[:, None]
        inside = torch.ones(len(i), keys, dtype=torch.bool, device=i.device)
        if right >= 0:
            inside &= columns <= place + right
        if left >= 0:
            inside &= columns >= place - left
        return inside

    return keep


def _short(value: float) -> float:
    return float(f"{value:.3g}")
