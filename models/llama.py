"""Define a Llama decoder: grouped-query attention, rotary positions, RMSNorm, SwiGLU, and a static KV cache for decode.

Papers: arXiv:2302.13971 (Llama), arXiv:2305.13245 (GQA), arXiv:2104.09864 (RoPE).
"""

from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcompile.models.entry import Inputs, ZooEntry, build_seeded, random_tokens


@dataclass(frozen=True)
class LlamaConfig:
    """Hold the sizes of a Llama; `width` is the residual stream, `hidden` the feed-forward layer."""

    vocab: int = 32000
    width: int = 2048
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    hidden: int = 8192
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    max_seq: int = 8192

    @classmethod
    def tiny(cls) -> Self:
        """Return the sizes for tests: 2 layers, GQA 4/2, 128 positions."""
        return cls(
            vocab=256, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, hidden=128, rope_theta=1e4, max_seq=128
        )

    @classmethod
    def base(cls) -> Self:
        """Return realistic sizes: those of a 1.2-billion-parameter Llama 3.2."""
        return cls(vocab=128256)


class RMSNorm(nn.Module):
    """Scale the last axis to root mean square 1 in float32, then by a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[..., C]`."""
        high = x.float()
        scaled = high * torch.rsqrt(high.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines `[S, D]` in float32 for positions `[S]`."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None].float() * theta**-exponent
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head: x `[B, H, S, D]`, tables `[S, D]`."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class KVCache(nn.Module):
    """Hold keys and values `[B, Hkv, S_max, D]` of one layer in buffers of a fixed size."""

    k: Tensor
    v: Tensor

    def __init__(self, batch: int, kv_heads: int, length: int, head_dim: int, like: Tensor) -> None:
        super().__init__()
        shape = (batch, kv_heads, length, head_dim)
        self.register_buffer("k", like.new_zeros(shape), persistent=False)
        self.register_buffer("v", like.new_zeros(shape), persistent=False)

    def update(self, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values `[B, Hkv, S, D]` at `positions` `[S]` and return the whole buffers."""
        self.k.index_copy_(2, positions, k)
        self.v.index_copy_(2, positions, v)
        return self.k, self.v


class Attention(nn.Module):
    """Attend causally with grouped key and value heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Attend within x `[B, S, C]`, or from it to the cache; without a mask the pattern is causal."""
        batch, seq, _ = x.shape
        q = rotate(self.q_proj(x).view(batch, seq, -1, self.head_dim).transpose(1, 2), *rope)
        k = rotate(self.k_proj(x).view(batch, seq, -1, self.head_dim).transpose(1, 2), *rope)
        v = self.v_proj(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        if cache is not None and positions is not None:
            k, v = cache.update(positions, k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, seq, -1))


class SwiGLU(nn.Module):
    """Apply the gated feed-forward layer `down(silu(gate(x)) * up(x))`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Add attention and feed-forward to the residual stream, each behind its norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.hidden)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        x = x + self.attn(self.attn_norm(x), rope, mask, cache, positions)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """Predict the next token at every position; the output layer shares the embedding's weight."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Score the next token.

        Args:
            tokens: ids `[B, S]`.
            padding: 1 for real tokens and 0 for padding on the right, `[B, S]`; keys at padding are hidden. A query
                without any visible key (padding on the left) gives NaN or a mean, as PyTorch defines it.

        Returns:
            Logits `[B, S, vocab]`.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        mask = None
        if padding is not None:
            causal = positions[None, :] <= positions[:, None]
            mask = causal[None, None] & padding[:, None, None, :].bool()
        return self.run(tokens, positions, mask, None)

    def run(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, caches: nn.ModuleList | None) -> Tensor:
        """Run all layers on tokens `[B, S]` at `positions` `[S]`, with one cache per layer or none."""
        rope = rotary_tables(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embed(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, mask, None if caches is None else caches[index], positions)
        return F.linear(self.norm(x), self.embed.weight)


class LlamaDecoder(nn.Module):
    """Run a Llama with static KV caches as its own buffers: prefill and decode steps alike."""

    def __init__(self, model: Llama, batch: int, length: int) -> None:
        super().__init__()
        config, like = model.config, model.embed.weight
        self.model = model
        self.length = length
        self.caches = nn.ModuleList(
            KVCache(batch, config.kv_heads, length, config.head_dim, like) for _ in range(config.layers)
        )

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Score the next token for tokens `[B, S]` that stand at `positions` `[S]`, which must rise.

        Every position below the first one must have been run before. Returns logits `[B, S, vocab]`.
        """
        slots = torch.arange(self.length, device=tokens.device)
        mask = slots[None, :] <= positions[:, None]
        return self.model.run(tokens, positions, mask[None, None], self.caches)


def _inputs(vocab: int, batch: int, seq: int) -> Inputs:
    return (random_tokens(batch, seq, vocab),), {}


def _entry(name: str, summary: str, config: LlamaConfig, default_seq: int) -> ZooEntry:
    return ZooEntry(
        name=name,
        summary=summary,
        source="random weights, seed 0",
        license="Apache-2.0",
        build=partial(build_seeded, lambda: Llama(config)),
        inputs=partial(_inputs, config.vocab),
        default_seq=default_seq,
        max_seq=config.max_seq,
    )


ENTRIES = (_entry("llama-tiny", "Llama, 2 layers, 64 wide, GQA 4/2, random weights", LlamaConfig.tiny(), 32),)
