"""Define a GPT with attention written by hand, the spelling that teaching code and many users' models share.

Scores, a triangular buffer, softmax, dropout and the product are separate operations here on purpose: this file is what
the recognizer of hand-written attention has to see through. Model: GPT-2, Radford et al. 2019.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcompile.models.entry import Inputs, ZooEntry, build_seeded, random_tokens


@dataclass(frozen=True)
class NanoGPTConfig:
    """Hold the sizes of a GPT."""

    vocab: int = 50304
    width: int = 768
    layers: int = 12
    heads: int = 12
    max_seq: int = 1024
    dropout: float = 0.1
    bias: bool = True

    @classmethod
    def tiny(cls) -> Self:
        """Return the sizes for tests: 2 layers, 64 wide, 128 positions."""
        return cls(vocab=256, width=64, layers=2, heads=4, max_seq=128)

    @classmethod
    def gpt2(cls) -> Self:
        """Return realistic sizes: those of GPT-2 with 124 million parameters."""
        return cls()


class CausalSelfAttention(nn.Module):
    """Attend causally, one operation a line."""

    tril: Tensor

    def __init__(self, config: NanoGPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.proj = nn.Linear(config.width, config.width, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.out_dropout = nn.Dropout(config.dropout)
        tril = torch.tril(torch.ones(config.max_seq, config.max_seq)).view(1, 1, config.max_seq, config.max_seq)
        self.register_buffer("tril", tril, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        batch, seq, width = x.size()
        q, k, v = self.qkv(x).split(width, dim=2)
        q = q.view(batch, seq, self.heads, width // self.heads).transpose(1, 2)
        k = k.view(batch, seq, self.heads, width // self.heads).transpose(1, 2)
        v = v.view(batch, seq, self.heads, width // self.heads).transpose(1, 2)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.tril[:, :, :seq, :seq] == 0, float("-inf"))
        weights = F.softmax(scores, dim=-1)
        weights = self.attn_dropout(weights)
        y = weights @ v
        y = y.transpose(1, 2).contiguous().view(batch, seq, width)
        return self.out_dropout(self.proj(y))


class GPTBlock(nn.Module):
    """Add attention and feed-forward to the residual stream, each behind its norm."""

    def __init__(self, config: NanoGPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = CausalSelfAttention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width, bias=config.bias),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width, bias=config.bias),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class NanoGPT(nn.Module):
    """Predict the next token at every position; the output layer shares the embedding's weight."""

    def __init__(self, config: NanoGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.max_seq, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(GPTBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Score the next token for ids `[B, S]`; returns logits `[B, S, vocab]`."""
        places = torch.arange(tokens.size(1), device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _inputs(vocab: int, batch: int, seq: int) -> Inputs:
    return (random_tokens(batch, seq, vocab),), {}


def _entry(name: str, summary: str, config: NanoGPTConfig, default_seq: int) -> ZooEntry:
    return ZooEntry(
        name=name,
        summary=summary,
        source="random weights, seed 0",
        license="Apache-2.0",
        build=partial(build_seeded, lambda: NanoGPT(config)),
        inputs=partial(_inputs, config.vocab),
        default_seq=default_seq,
        max_seq=config.max_seq,
    )


ENTRIES = (
    _entry(
        "nanogpt-tiny", "GPT with hand-written attention, 2 layers, 64 wide, random weights", NanoGPTConfig.tiny(), 32
    ),
    _entry(
        "nanogpt", "GPT with hand-written attention, GPT-2 sizes (124 M), random weights", NanoGPTConfig.gpt2(), 256
    ),
)
