"""Define an encoder-decoder in the manner of T5: relative position bias, no score scale, cross attention.

Paper: arXiv:1910.10683.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcompile.models.entry import Inputs, ZooEntry, build_seeded, ragged_padding, random_tokens
from effcompile.models.llama import RMSNorm


@dataclass(frozen=True)
class Seq2SeqConfig:
    """Hold the sizes of an encoder-decoder; `buckets` and `distance` shape the relative position bias."""

    vocab: int = 32128
    width: int = 512
    layers: int = 6
    heads: int = 8
    head_dim: int = 64
    hidden: int = 2048
    buckets: int = 32
    distance: int = 128
    max_seq: int = 512
    norm_eps: float = 1e-6

    @classmethod
    def tiny(cls) -> Self:
        """Return the sizes for tests: 2 + 2 layers, 64 wide."""
        return cls(vocab=256, width=64, layers=2, heads=4, head_dim=16, hidden=128, buckets=8, distance=32, max_seq=128)

    @classmethod
    def small(cls) -> Self:
        """Return realistic sizes: those of T5-small."""
        return cls()


def position_buckets(offset: Tensor, buckets: int, distance: int, bidirectional: bool) -> Tensor:
    """Sort offsets (key index - query index) into buckets: exact near zero, logarithmic up to `distance`."""
    base = torch.zeros_like(offset)
    if bidirectional:
        buckets //= 2
        base = (offset > 0).long() * buckets
        away = offset.abs()
    else:
        away = (-offset).clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(away.clamp(min=1).float() / exact) / math.log(distance / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return base + torch.where(away < exact, away, far)


class RelativeBias(nn.Module):
    """Give each head a learned bias per bucket of the offset; all layers of a stack share it."""

    def __init__(self, config: Seq2SeqConfig, bidirectional: bool) -> None:
        super().__init__()
        self.config = config
        self.bidirectional = bidirectional
        self.table = nn.Embedding(config.buckets, config.heads)

    def forward(self, positions: Tensor) -> Tensor:
        """Compute the bias `[1, H, S, S]` among positions `[S]`."""
        offset = positions[None, :] - positions[:, None]
        buckets = position_buckets(offset, self.config.buckets, self.config.distance, self.bidirectional)
        return self.table(buckets).permute(2, 0, 1)[None]


class CrossOrSelfAttention(nn.Module):
    """Attend to a memory (or to the input itself) with an additive float mask and scale 1."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Attend from x `[B, S, C]` to memory `[B, T, C]` under an additive mask `[B or 1, H or 1, S or 1, T]`."""
        q, k, v = (
            proj(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj, source in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Apply two layers with ReLU between."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.wi = nn.Linear(config.width, config.hidden, bias=False)
        self.wo = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        return self.wo(F.relu(self.wi(x)))


class EncoderLayer(nn.Module):
    """Add self-attention and feed-forward, each behind its norm."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = CrossOrSelfAttention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map `[B, T, C]` to the same shape."""
        h = self.attn_norm(x)
        x = x + self.attn(h, h, mask)
        return x + self.mlp(self.mlp_norm(x))


class DecoderLayer(nn.Module):
    """Add causal self-attention, cross attention and feed-forward, each behind its norm."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = CrossOrSelfAttention(config)
        self.cross_norm = RMSNorm(config.width, config.norm_eps)
        self.cross = CrossOrSelfAttention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor, memory_mask: Tensor) -> Tensor:
        """Map `[B, S, C]` to the same shape with a memory `[B, T, C]`."""
        h = self.attn_norm(x)
        x = x + self.attn(h, h, mask)
        x = x + self.cross(self.cross_norm(x), memory, memory_mask)
        return x + self.mlp(self.mlp_norm(x))


class Seq2Seq(nn.Module):
    """Predict the next target token from a source text and the target so far."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.encoder_bias = RelativeBias(config, bidirectional=True)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.encoder_norm = RMSNorm(config.width, config.norm_eps)
        self.decoder_bias = RelativeBias(config, bidirectional=False)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.decoder_norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab, bias=False)

    def forward(self, source: Tensor, target: Tensor, source_padding: Tensor) -> Tensor:
        """Score the next target token.

        Args:
            source: ids `[B, T]`.
            target: ids `[B, S]`, shifted right.
            source_padding: 1 for real source tokens and 0 for padding, `[B, T]`.

        Returns:
            Logits `[B, S, vocab]`.
        """
        hidden = _hide(source_padding[:, None, None, :] == 0, self.embed.weight)
        memory = self.encode(source, hidden)
        positions = torch.arange(target.shape[1], device=target.device)
        future = _hide(positions[None, :] > positions[:, None], self.embed.weight)
        mask = self.decoder_bias(positions) + future
        x = self.embed(target)
        for layer in self.decoder:
            x = layer(x, memory, mask, hidden)
        return self.head(self.decoder_norm(x))

    def encode(self, source: Tensor, hidden: Tensor) -> Tensor:
        """Encode ids `[B, T]` under an additive mask `[B, 1, 1, T]`; returns states `[B, T, C]`."""
        mask = self.encoder_bias(torch.arange(source.shape[1], device=source.device)) + hidden
        x = self.embed(source)
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x)


def _hide(where: Tensor, like: Tensor) -> Tensor:
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(where.shape, dtype=like.dtype, device=where.device).masked_fill(where, lowest)


def _inputs(vocab: int, batch: int, seq: int) -> Inputs:
    target = random_tokens(batch, max(1, seq // 2), vocab)
    return (random_tokens(batch, seq, vocab), target, ragged_padding(batch, seq)), {}


def _entry(name: str, summary: str, config: Seq2SeqConfig, default_seq: int) -> ZooEntry:
    return ZooEntry(
        name=name,
        summary=summary,
        source="random weights, seed 0",
        license="Apache-2.0",
        build=partial(build_seeded, lambda: Seq2Seq(config)),
        inputs=partial(_inputs, config.vocab),
        default_seq=default_seq,
        max_seq=config.max_seq,
    )


ENTRIES = (_entry("seq2seq-tiny", "T5-like encoder-decoder, 2 + 2 layers, random weights", Seq2SeqConfig.tiny(), 32),)
