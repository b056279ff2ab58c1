"""Step along a diffusion process: flow matching by Euler, variance preserving by DDIM, both with diffusers' arithmetic.

Each operation and each cast is that of the stock scheduler, so that one stage in the native size gives its bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v", "sample"]


class DiffusionProcess(ABC):
    """Know what a denoiser's answer means and how noise is mixed in."""

    @abstractmethod
    def step(self, x: Tensor, out: Tensor, level: float, after: float) -> Tensor:
        """Return x, the denoiser's answer `out` at `level`, one step later, in the dtype of `out`."""

    @abstractmethod
    def noised(self, data: Tensor, noise: Tensor, level: float) -> Tensor:
        """Return data mixed with noise at a level, in float32."""


@dataclass(frozen=True)
class FlowMatching(DiffusionProcess):
    """Follow a velocity `noise - data` by Euler steps in float32."""

    def step(self, x: Tensor, out: Tensor, level: float, after: float) -> Tensor:
        """Return x + (after - level) out; with after 0 this is the data that `out` predicts."""
        # Scalars of no dimension, as the scheduler has them: a product with them keeps the dtype of `out`.
        first, second = torch.tensor([level, after], dtype=torch.float32, device=x.device)
        return (x.to(torch.float32) + (second - first) * out).to(out.dtype)

    def noised(self, data: Tensor, noise: Tensor, level: float) -> Tensor:
        """Return (1 - level) data + level noise."""
        share = torch.tensor(level, dtype=torch.float32, device=data.device)
        return share * noise.float() + (1.0 - share) * data.float()


@dataclass(frozen=True)
class VariancePreserving(DiffusionProcess):
    """Follow DDIM without added noise. `alphas` `[T]` are the cumulative products, a level is a timestep, -1 is data.

    `mixed` steps from x and the predicted data instead of data and noise, as CogVideoX's scheduler does: the same numbers but for
    rounding, and no division by the root of alpha, which is 0 at the first timestep of a process without signal there.
    """

    alphas: Tensor
    prediction: Prediction = "epsilon"
    mixed: bool = False

    @classmethod
    def scaled_linear(
        cls, begin: float = 0.00085, end: float = 0.012, count: int = 1000, prediction: Prediction = "epsilon"
    ) -> VariancePreserving:
        """Return the process of Stable Diffusion: betas whose roots are even."""
        betas = torch.linspace(begin**0.5, end**0.5, count, dtype=torch.float32) ** 2
        return cls(torch.cumprod(1.0 - betas, dim=0), prediction)

    def shifted(self, scale: float) -> VariancePreserving:
        """Return the process with its signal over noise divided by `scale` (CogVideoX)."""
        return replace(self, alphas=self.alphas / (scale + (1 - scale) * self.alphas))

    def step(self, x: Tensor, out: Tensor, level: float, after: float) -> Tensor:
        """Return x at the earlier timestep `after`."""
        now, then = self._alpha(level, x), self._alpha(after, x)
        beta = 1 - now
        if self.prediction == "epsilon":
            data, noise = (x - beta**0.5 * out) / now**0.5, out
        elif self.prediction == "v":
            data, noise = (now**0.5) * x - (beta**0.5) * out, (now**0.5) * out + (beta**0.5) * x
        else:
            data, noise = out, (x - now**0.5 * out) / beta**0.5
        if self.mixed:
            kept = ((1 - then) / (1 - now)) ** 0.5
            return kept * x + (then**0.5 - now**0.5 * kept) * data
        return then**0.5 * data + (1 - then) ** 0.5 * noise

    def noised(self, data: Tensor, noise: Tensor, level: float) -> Tensor:
        """Return sqrt(alpha) data + sqrt(1 - alpha) noise."""
        now = self._alpha(level, data)
        return now**0.5 * data.float() + (1 - now) ** 0.5 * noise.float()

    def _alpha(self, level: float, like: Tensor) -> Tensor:
        found = torch.tensor(1.0) if level < 0 else self.alphas[int(level)]
        # No dimension: a product with it keeps the dtype of x, whatever precision the scheduler holds its alphas in.
        return found.to(device=like.device, dtype=self.alphas.dtype)
