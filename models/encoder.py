"""Define a BERT encoder: learned positions, token types, norm after each residual, key padding mask.

Papers: arXiv:1810.04805 (BERT), arXiv:2002.10957 (MiniLM).
"""

from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcompile.models.entry import Inputs, ZooEntry, build_seeded, ragged_padding, random_tokens
from effcompile.models.pooling import MeanPooledEncoder

__all__ = ["ENTRIES", "Encoder", "EncoderConfig", "MeanPooledEncoder"]


@dataclass(frozen=True)
class EncoderConfig:
    """Hold the sizes of an encoder."""

    vocab: int = 30522
    width: int = 384
    layers: int = 6
    heads: int = 12
    hidden: int = 1536
    max_seq: int = 512
    token_types: int = 2
    norm_eps: float = 1e-12

    @classmethod
    def tiny(cls) -> Self:
        """Return the sizes for tests: 2 layers, 64 wide, 128 positions."""
        return cls(vocab=256, width=64, layers=2, heads=4, hidden=128, max_seq=128)

    @classmethod
    def minilm(cls) -> Self:
        """Return realistic sizes: those of MiniLM-L6."""
        return cls()


class SelfAttention(nn.Module):
    """Attend in both directions, with biases on all four projections."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within x `[B, S, C]`; mask `[B, 1, 1, S]` is true at visible keys."""
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.query, self.key, self.value)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Normalize after each residual sum, as BERT does."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attn = SelfAttention(config)
        self.attn_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.up = nn.Linear(config.width, config.hidden)
        self.down = nn.Linear(config.hidden, config.width)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        x = self.attn_norm(x + self.attn(x, mask))
        return self.mlp_norm(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """Turn token ids into one state per token."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab, config.width, padding_idx=0)
        self.positions = nn.Embedding(config.max_seq, config.width)
        self.types = nn.Embedding(config.token_types, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Encode ids `[B, S]`; mask 1 for real tokens `[B, S]`; types `[B, S]`. Returns states `[B, S, C]`."""
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.words(input_ids) + self.positions(places) + self.types(token_type_ids))
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        for layer in self.layers:
            x = layer(x, mask)
        return x


def _inputs(vocab: int, batch: int, seq: int) -> Inputs:
    padding = ragged_padding(batch, seq)
    return (), {"input_ids": random_tokens(batch, seq, vocab) * padding, "attention_mask": padding}


def _entry(name: str, summary: str, config: EncoderConfig, default_seq: int) -> ZooEntry:
    return ZooEntry(
        name=name,
        summary=summary,
        source="random weights, seed 0",
        license="Apache-2.0",
        build=partial(build_seeded, lambda: MeanPooledEncoder(Encoder(config))),
        inputs=partial(_inputs, config.vocab),
        default_seq=default_seq,
        max_seq=config.max_seq,
    )


ENTRIES = (_entry("encoder-tiny", "BERT with mean-pool, 2 layers, 64 wide, random weights", EncoderConfig.tiny(), 32),)
