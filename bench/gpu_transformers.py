"""Build denoisers with the shapes of known ones and random weights, and the ways to sample with them that are compared on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effcompile as eff
from effcompile.core.schedule import Size
from effcompile.models.dit import DiTBlock, DiTConfig, TimeEmbedding


@dataclass(frozen=True)
class Shape:
    """Hold the sizes of a denoiser: its latent with frames first where there are any, and what a run of its pipeline has.

    `layers` are fewer than the model's own, so that a run ends in seconds; a step of each layer is as in the model. `replay` is how
    Re-ttention's paper sets it for the model, `low` the share of the edges in a low stage, which must be whole tokens.
    """

    size: Size
    width: int
    heads: int
    text: int
    layers: int
    own_layers: int
    steps: int
    batch: int
    replay: str
    channels: int = 16
    low: float = 0.5

    @property
    def frames(self) -> int:
        """Count the frames, 0 for a picture."""
        return self.size[0] if len(self.size) == 3 else 0

    @property
    def tokens(self) -> int:
        """Count the tokens that attend to each other, those of text among them."""
        return self.of.tokens(self.size) + self.text

    @property
    def of(self) -> eff.Denoising:
        """Return what a schedule must know; half of the edges is taken to be a size that was trained."""
        *frames, height, width = self.size
        least = (*frames, height // 2, width // 2)
        return eff.Denoising(
            self.size, self.steps, 3.0, least=least, patch=2, multiple=2, width=self.width, text=self.text
        )


SHAPES: Mapping[str, Shape] = {
    "cogvideox-2b": Shape(
        (13, 60, 90), 1920, 30, 226, 3, 30, 50, 2, "keep=0.03125,warmup=15,period=5", low=0.6666666667
    ),
    "flux": Shape((128, 128), 3072, 24, 512, 6, 57, 28, 1, "keep=0.03125,warmup=5,period=5"),
    "pixart-1024": Shape((128, 128), 1152, 16, 0, 7, 28, 20, 2, "keep=0.03125,warmup=5,period=5", 4),
}


class ShapedTransformer(nn.Module):
    """Attend over text and patches alike in blocks of a DiT; pictures `[B, C, H, W]` or videos `[B, C, F, H, W]` of any size.

    Queries and keys are scaled so that attention is far from even, as it is in trained models.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        config = DiTConfig(width=shape.width, heads=shape.heads, zero_init=False)
        self.patches = nn.Linear(4 * shape.channels, shape.width)
        self.time = TimeEmbedding(256, shape.width)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(shape.layers))
        self.out = nn.Linear(shape.width, 4 * shape.channels)
        with torch.no_grad():
            for block in self.blocks:
                assert isinstance(block, DiTBlock)
                block.qkv.weight[: 2 * shape.width] *= 4

    def forward(self, latent: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """Return the velocity of latents at times `[B]`, under text `[B, T, width]`."""
        height, width = latent.shape[-2:]
        cells = latent.unflatten(-1, (width // 2, 2)).unflatten(-3, (height // 2, 2))  # B C (F) h 2 w 2
        video = cells.dim() == 7
        x = cells.permute(0, 2, 3, 5, 1, 4, 6) if video else cells.permute(0, 2, 4, 1, 3, 5)
        grid = x.shape[1:-3]
        x = torch.cat((text, self.patches(x.flatten(-3).flatten(1, -2))), 1)
        condition = self.time(time)
        for block in self.blocks:
            x = block(x, condition)
        x = self.out(F.layer_norm(x[:, text.shape[1] :], x.shape[-1:]))
        x = x.unflatten(1, grid).unflatten(-1, (-1, 2, 2))
        back = x.permute(0, 4, 1, 2, 5, 3, 6) if video else x.permute(0, 3, 1, 4, 2, 5)
        return back.flatten(-2).flatten(-3, -2)


@dataclass(frozen=True)
class Way:
    """Hold how an arm samples: a schedule and a cache, an attention policy of the graphs, or one that is replayed."""

    schedule: str = "plain"
    cache: str = ""
    attention: str = ""
    replay: str = ""


def ways(shape: Shape) -> dict[str, Way]:
    """Return the arms of a shape, the dense one first."""
    video = f"text={shape.text},frames={shape.frames}"
    block = "block=64"
    found = {
        "dense": Way(),
        "block-topk": Way(attention=f"block-topk{{density=0.25,{block}}}"),
        "pooled-cdf": Way(attention=f"pooled-cdf{{cdf=0.9,{block}}}"),
        "svg2": Way(attention=f"svg2{{text={shape.text}}}"),
        "re-ttention": Way(replay=f"re-ttention{{{shape.replay}{',' + video if shape.frames else ''}}}"),
        "taylor-3": Way(cache="taylor{interval=3,warmup=3}"),
        "bottleneck": Way(f"bottleneck{{{_thirds(shape.steps)},low={shape.low}}}"),
        "low-high": Way(f"predict-x0{{steps={shape.steps},scales=[{shape.low},1.0]}}"),
        "low-high-taylor-3": Way(
            f"predict-x0{{steps={shape.steps},scales=[{shape.low},1.0]}}", "taylor{interval=3,warmup=3}"
        ),
    }
    if shape.frames:
        found["svg"] = Way(attention=f"svg{{keep=0.25,{video}}}")
        found["radial"] = Way(attention=f"radial{{{video}}}")
    return found


def _thirds(steps: int) -> str:
    """Return the steps of a bottleneck, in the shares of its presets: 4, 13 and 8 of 25."""
    high, low = max(1, round(steps * 4 / 25)), max(1, round(steps * 13 / 25))
    return f"steps=[{high},{low},{max(1, steps - high - low)}],terminal=0.02"


def sampler(model: nn.Module, shape: Shape, way: Way, compiled: bool = True) -> Any:
    """Return the sampler of an arm; each compiles graphs of its own."""
    given: dict[str, Any] = {"schedule": way.schedule, "cache": way.cache or None, "compiled": compiled}
    if way.replay:
        given["replay"] = way.replay
    elif way.attention:
        given["options"] = {"attention": way.attention, "require": {"attention": 0}}
    return eff.sampler(model, shape.of, **given)
