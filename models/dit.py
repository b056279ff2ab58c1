"""Define a diffusion transformer: patches of a latent, adaLN-zero conditioning on time and class, velocity output.

Papers: arXiv:2212.09748 (DiT), arXiv:2209.03003 (rectified flow).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcompile.models.entry import Inputs, ZooEntry, build_seeded, random_normal


@dataclass(frozen=True)
class DiTConfig:
    """Hold the sizes of a DiT; `latent` and `patch` are edge lengths in latent pixels.

    `others` are further edge lengths that it is trained for: it is told the size, and places span the same range at each.
    `zero_init` starts every gate and the output at zero, as training needs. A random model for tests must not: its
    output would be zero whatever a rewrite did to it.
    """

    latent: int = 32
    patch: int = 2
    channels: int = 4
    width: int = 1152
    layers: int = 28
    heads: int = 16
    classes: int = 1000
    frequencies: int = 256
    zero_init: bool = True
    others: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Count the patches."""
        return (self.latent // self.patch) ** 2

    @classmethod
    def tiny(cls) -> Self:
        """Return the sizes for tests: 2 layers, 64 tokens, gates that are not zero."""
        return cls(latent=16, width=64, layers=2, heads=4, classes=10, frequencies=32, zero_init=False)

    @classmethod
    def long(cls) -> Self:
        """Return two layers of the XL width at 4,096 tokens, gates that are not zero."""
        return cls(latent=128, layers=2, zero_init=False)

    @classmethod
    def xl(cls) -> Self:
        """Return realistic sizes: those of DiT-XL/2 at 256x256 pixels."""
        return cls()


def sinusoid(values: Tensor, width: int, period: float = 10_000.0) -> Tensor:
    """Embed values `[N]` as cosines and sines `[N, width]` in float32."""
    half = width // 2
    steps = torch.arange(half, device=values.device, dtype=torch.float32) / half
    angles = values.float()[:, None] * torch.exp(-math.log(period) * steps)[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def grid_positions(edge: int, width: int, span: int | None = None) -> Tensor:
    """Embed the places of a square grid, rows in one half and columns in the other: `[edge**2, width]`.

    `span` is the edge of the grid whose range the places take, their own where None: patches lie at the middle of their share.
    """
    places = torch.arange(edge)
    axis = sinusoid(places if span in (None, edge) else (places + 0.5) * (span / edge) - 0.5, width // 2)
    rows = axis[:, None, :].expand(edge, edge, -1)
    columns = axis[None, :, :].expand(edge, edge, -1)
    return torch.cat((rows, columns), dim=-1).reshape(edge * edge, width)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale tokens `[B, N, C]` by one vector `[B, C]` each."""
    return x * (1 + scale[:, None, :]) + shift[:, None, :]


class TimeEmbedding(nn.Module):
    """Embed the time in [0, 1] through sinusoids and two layers."""

    def __init__(self, frequencies: int, width: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.fc1 = nn.Linear(frequencies, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        """Map times `[B]` to `[B, C]`."""
        waves = sinusoid(time * 1000.0, self.frequencies).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(waves)))


class DiTBlock(nn.Module):
    """Attend and feed forward, each with shift, scale and gate from the condition."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.ada = nn.Linear(width, 6 * width)
        if config.zero_init:
            nn.init.zeros_(self.ada.weight)
            nn.init.zeros_(self.ada.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map tokens `[B, N, C]` under a condition `[B, C]` to the same shape."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(F.silu(condition)).chunk(6, dim=-1)
        qkv = self.qkv(modulate(self.norm1(x), shift1, scale1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1[:, None, :] * self.proj(attended)
        hidden = F.gelu(self.fc1(modulate(self.norm2(x), shift2, scale2)), approximate="tanh")
        return x + gate2[:, None, :] * self.fc2(hidden)


class DiT(nn.Module):
    """Predict the velocity `noise - data` of a rectified flow."""

    positions: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        edge, values = config.latent // config.patch, config.patch**2 * config.channels
        self.patches = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)
        self.register_buffer("positions", grid_positions(edge, config.width), persistent=False)
        for other in config.others:
            places = grid_positions(other // config.patch, config.width, edge)
            self.register_buffer(f"positions_{other}", places, persistent=False)
        self.time = TimeEmbedding(config.frequencies, config.width)
        # One row more than classes: the label `classes` means no class, for classifier-free guidance.
        self.label = nn.Embedding(config.classes + 1, config.width)
        self.size = nn.Embedding(1 + len(config.others), config.width) if config.others else None
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.ada = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, values)
        if config.zero_init:
            for layer in (self.ada, self.out):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, latent: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Denoise.

        Args:
            latent: `[B, channels, latent, latent]`, or of one of the other sizes.
            time: 0 (data) to 1 (noise), `[B]`.
            label: class ids `[B]`; `classes` stands for none.

        Returns:
            The velocity, shaped like `latent`.
        """
        x, condition = self.embed(latent, time, label)
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x, condition)

    def embed(self, latent: Tensor, time: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens `[B, N, C]` of a latent and the condition `[B, C]`."""
        edge, config = latent.shape[-1], self.config
        condition = self.time(time) + self.label(label)
        positions = self.positions
        if self.size is not None:
            number = 0 if edge == config.latent else 1 + config.others.index(edge)
            condition = condition + self.size.weight[number]
            positions = positions if number == 0 else getattr(self, f"positions_{edge}")
        return self.patches(latent).flatten(2).transpose(1, 2) + positions, condition

    def head(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return the velocity that the last tokens `[B, N, C]` stand for, shaped like the latent."""
        shift, scale = self.ada(F.silu(condition)).chunk(2, dim=-1)
        return self.unpatchify(self.out(modulate(self.norm(x), shift, scale)))

    def unpatchify(self, x: Tensor) -> Tensor:
        """Put patches `[B, N, patch**2 * channels]` back into a square latent `[B, channels, edge, edge]`."""
        patch = self.config.patch
        size = self.config.latent if self.size is None else math.isqrt(x.shape[1]) * patch
        grid = x.view(-1, size // patch, size // patch, patch, patch, self.config.channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.channels, size, size)


class SizedDiT(nn.Module):
    """Be a DiT that was trained for several sizes, in one graph for all: `size` says which it is, as `conditions` gives it."""

    def __init__(self, model: DiT) -> None:
        super().__init__()
        assert model.size is not None, "a model of one size needs no such thing"
        self.model = model

    def conditions(self, size: tuple[int, ...]) -> dict[str, Tensor]:
        """Return what a latent of this size comes with."""
        config = self.model.config
        edge = size[-1]
        return {"size": torch.tensor(0 if edge == config.latent else 1 + config.others.index(edge))}

    def forward(self, latent: Tensor, time: Tensor, label: Tensor, size: Tensor) -> Tensor:
        """Denoise as the model does; sizes of the latent may be symbols."""
        model, config = self.model, self.model.config
        assert model.size is not None, "checked before"
        condition = model.time(time) + model.label(label) + model.size(size)
        rows, columns = (edge // config.patch for edge in latent.shape[2:])
        span, half = config.latent // config.patch, config.width // 2
        places = [(torch.arange(count, device=latent.device) + 0.5) * (span / count) - 0.5 for count in (rows, columns)]
        down, across = (sinusoid(axis, half).to(latent.dtype) for axis in places)
        grid = torch.cat((down[:, None].expand(-1, columns, -1), across[None].expand(rows, -1, -1)), dim=-1)
        x = model.patches(latent).flatten(2).transpose(1, 2) + grid.reshape(rows * columns, config.width)
        for block in model.blocks:
            x = block(x, condition)
        shift, scale = model.ada(F.silu(condition)).chunk(2, dim=-1)
        cells = model.out(modulate(model.norm(x), shift, scale))
        cells = cells.view(-1, rows, columns, config.patch, config.patch, config.channels)
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(-1, config.channels, rows * config.patch, columns * config.patch)


Region = Callable[..., Any]


def regions(model: DiT, first: int = 1) -> tuple[Region, Region, Region]:
    """Return (head, body, tail) of a DiT, as `eff.Regions(*...)` takes them: the head holds the embedding and the `first` blocks.

    The probe is what the last block of the head added to its tokens `[B, N, C]`.
    """

    def head(latent: Tensor, time: Tensor, label: Tensor) -> tuple[tuple[Tensor], tuple[Tensor], Tensor]:
        x, condition = model.embed(latent, time, label)
        before = x
        for block in list(model.blocks)[:first]:
            before, x = x, block(x, condition)
        return (x,), (condition,), x - before

    def body(hidden: tuple[Tensor], context: tuple[Tensor]) -> tuple[Tensor]:
        (x,), (condition,) = hidden, context
        for block in list(model.blocks)[first:]:
            x = block(x, condition)
        return (x,)

    def tail(hidden: tuple[Tensor], context: tuple[Tensor]) -> Tensor:
        return model.head(hidden[0], context[0])

    return head, body, tail


def _inputs(config: DiTConfig, batch: int, seq: int) -> Inputs:
    latent = random_normal(batch, config.channels, config.latent, config.latent)
    time = (torch.arange(batch) + 1) / (batch + 1)
    return (latent, time, torch.arange(batch) % config.classes), {}


def _entry(name: str, summary: str, config: DiTConfig) -> ZooEntry:
    return ZooEntry(
        name=name,
        summary=summary,
        source="random weights, seed 0, gates not zero",
        license="Apache-2.0",
        build=partial(build_seeded, lambda: DiT(config)),
        inputs=partial(_inputs, config),
        default_seq=config.tokens,
        fixed_seq=config.tokens,
    )


ENTRIES = (
    _entry("dit-tiny", "DiT, 2 layers, 64 wide, 64 tokens, random weights", DiTConfig.tiny()),
    _entry("dit-4k", "DiT, 2 layers of XL width (1152), 4,096 tokens, random weights", DiTConfig.long()),
)
