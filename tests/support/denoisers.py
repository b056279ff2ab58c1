"""Give denoisers whose answers are known: of Gaussian data, and a small network that a test can count the calls of."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from effcompile.core.schedule import Denoising


def facts(edge: int = 16, **more: object) -> Denoising:
    """Return what is known of a square denoiser that was trained down to half of its edge."""
    values: dict[str, object] = {"size": (edge, edge), "steps": 28, "least": (edge // 2, edge // 2), **more}
    return Denoising(**values)  # type: ignore[arg-type]


@dataclass
class GaussianFlow:
    """Answer with the velocity E[n - x0 | x] where every value of the data is N(mean, deviation^2)."""

    mean: float = 0.7
    deviation: float = 0.4
    sizes: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        """Return the velocity, affine in x."""
        self.sizes.append(tuple(x.shape[2:]))
        level = time.reshape(-1, *[1] * (x.dim() - 1))
        spread = (1 - level) ** 2 * self.deviation**2 + level**2
        apart = x - (1 - level) * self.mean
        return level / spread * apart - (self.mean + (1 - level) * self.deviation**2 / spread * apart)


class SmallDenoiser(nn.Module):
    """A convolution with a few nonlinear blocks, of any size; `calls` counts."""

    def __init__(self, channels: int = 2, blocks: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(channels, 8, 3, padding=1)
            self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(blocks))
            self.last = nn.Conv2d(8, channels, 1)
        self.calls = 0

    def head(self, x: Tensor, time: Tensor) -> tuple[tuple[Tensor], tuple[Tensor], Tensor]:
        """Embed, and run the first block."""
        time = time.to(x.dtype)
        begun = self.first(x) + time.reshape(-1, 1, 1, 1)
        more = torch.tanh(self.blocks[0](begun))
        return (begun + more,), (time,), more

    def body(self, hidden: tuple[Tensor], context: tuple[Tensor]) -> tuple[Tensor]:
        """Run the other blocks."""
        self.calls += 1
        (x,) = hidden
        for block in list(self.blocks)[1:]:
            x = x + torch.tanh(block(x))
        return (x,)

    def tail(self, hidden: tuple[Tensor], context: tuple[Tensor]) -> Tensor:
        """Return the answer."""
        return self.last(hidden[0]) * (1 + context[0].reshape(-1, 1, 1, 1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Run all."""
        hidden, context, _ = self.head(x, time)
        return self.tail(self.body(hidden, context), context)
