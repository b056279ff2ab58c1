"""Define a vision transformer as in DINOv2: CLS token, learned positions, LayerScale.

Papers: arXiv:2010.11929 (ViT), arXiv:2304.07193 (DINOv2), arXiv:2103.17239 (LayerScale).
"""

from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcompile.models.entry import Inputs, ZooEntry, build_seeded, random_normal


@dataclass(frozen=True)
class ViTConfig:
    """Hold the sizes of a ViT; `image` and `patch` are edge lengths in pixels."""

    image: int = 224
    patch: int = 14
    channels: int = 3
    width: int = 384
    layers: int = 12
    heads: int = 6
    hidden: int = 1536
    layer_scale: float = 1.0
    norm_eps: float = 1e-6

    @property
    def tokens(self) -> int:
        """Count the patches and the CLS token."""
        return (self.image // self.patch) ** 2 + 1

    @classmethod
    def tiny(cls) -> Self:
        """Return the sizes for tests: 2 layers, 8x8 patches of a 32x32 image (17 tokens)."""
        return cls(image=32, patch=8, width=64, layers=2, heads=4, hidden=128)

    @classmethod
    def small(cls) -> Self:
        """Return realistic sizes: those of DINOv2 ViT-S/14."""
        return cls()


class LayerScale(nn.Module):
    """Multiply every channel by a learned factor."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        """Scale `[..., C]`."""
        return x * self.gamma


class ViTBlock(nn.Module):
    """Add attention and feed-forward to the residual stream, each normed before and scaled after."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.scale1 = LayerScale(config.width, config.layer_scale)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)
        self.scale2 = LayerScale(config.width, config.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, N, C]` to the same shape."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.scale1(self.proj(out))
        return x + self.scale2(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class ViT(nn.Module):
    """Turn an image into a CLS state and one state per patch."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)
        self.cls = nn.Parameter(torch.randn(1, 1, config.width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, config.tokens, config.width) * 0.02)
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels `[B, 3, image, image]` to states `[B, 1 + patches, C]`, CLS first."""
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def _inputs(config: ViTConfig, batch: int, seq: int) -> Inputs:
    return (random_normal(batch, config.channels, config.image, config.image),), {}


def _entry(name: str, summary: str, config: ViTConfig) -> ZooEntry:
    return ZooEntry(
        name=name,
        summary=summary,
        source="random weights, seed 0",
        license="Apache-2.0",
        build=partial(build_seeded, lambda: ViT(config)),
        inputs=partial(_inputs, config),
        default_seq=config.tokens,
        fixed_seq=config.tokens,
    )


ENTRIES = (_entry("vit-tiny", "ViT with LayerScale, 2 layers, 64 wide, 17 tokens, random weights", ViTConfig.tiny()),)
