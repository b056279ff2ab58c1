"""Define a decoder with codebook features: what attention heads return is snapped to the codes that it is most like.

Each head has a book of codes of its own. Its result, normed, is replaced by the mean of the `top_k` codes whose inner product with
it, over the code's norm, is largest; so a model's state between layers is a few discrete codes, which can be read and set. It is a
way to understand a model and costs time. In training gradients go straight through to the result and to the codes, and `loss` pulls
codes towards what they stand for. Paper: arXiv:2310.17230.
"""

from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcompile.models.entry import Inputs, ZooEntry, build_seeded, random_tokens
from effcompile.models.llama import LlamaConfig, RMSNorm, SwiGLU, rotary_tables, rotate


@dataclass(frozen=True)
class CodebookConfig:
    """Hold the sizes: `codes` in each head's book, of which `top_k` are averaged."""

    llama: LlamaConfig
    codes: int = 10_000
    top_k: int = 8

    @classmethod
    def tiny(cls) -> Self:
        """Return the sizes for tests."""
        return cls(LlamaConfig.tiny(), codes=96, top_k=4)

    @classmethod
    def base(cls) -> Self:
        """Return the paper's sizes: 6 layers of 8 heads of 64, 10,000 codes for each head."""
        return cls(
            LlamaConfig(
                vocab=50304, width=512, layers=6, heads=8, kv_heads=8, hidden=2048, rope_theta=1e4, max_seq=2048
            )
        )


class Snap(nn.Module):
    """Replace each group of features by the mean of its nearest codes."""

    def __init__(self, groups: int, width: int, codes: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.norm = nn.LayerNorm(groups * width)
        self.codes = nn.Parameter(torch.randn(groups, codes, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, G, D]` to the same shape."""
        normed = self.norm(x.flatten(-2)).view(x.shape)
        scores = torch.einsum("...gd,gnd->...gn", normed, self.codes) / self.codes.norm(dim=-1)
        ids = scores.topk(self.top_k, dim=-1).indices
        group = torch.arange(self.codes.shape[0], device=x.device)[:, None]
        out = self.codes[group, ids].mean(-2)
        return out + (x - x.detach()) if self.training else out

    def loss(self, x: Tensor) -> Tensor:
        """Return the mean squared distance of normed features to what they become; gradients go to the codes alone."""
        normed = self.norm(x.flatten(-2)).view(x.shape).detach()
        return F.mse_loss(self(x) - (x - x.detach()), normed)


class CodebookAttention(nn.Module):
    """Attend causally; the heads' results are snapped before they are mixed."""

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        llama = config.llama
        self.head_dim = llama.head_dim
        self.q_proj = nn.Linear(llama.width, llama.heads * llama.head_dim, bias=False)
        self.k_proj = nn.Linear(llama.width, llama.kv_heads * llama.head_dim, bias=False)
        self.v_proj = nn.Linear(llama.width, llama.kv_heads * llama.head_dim, bias=False)
        self.snap = Snap(llama.heads, llama.head_dim, config.codes, config.top_k)
        self.o_proj = nn.Linear(llama.heads * llama.head_dim, llama.width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        batch, seq, _ = x.shape
        q, k, v = (
            p(x).view(batch, seq, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(rotate(q, *rope), rotate(k, *rope), v, is_causal=True, enable_gqa=True)
        return self.o_proj(self.snap(out.transpose(1, 2)).flatten(-2))


class CodebookBlock(nn.Module):
    """Add attention and feed-forward to the residual stream, each behind its norm."""

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        llama = config.llama
        self.attn_norm = RMSNorm(llama.width, llama.norm_eps)
        self.attn = CodebookAttention(config)
        self.mlp_norm = RMSNorm(llama.width, llama.norm_eps)
        self.mlp = SwiGLU(llama.width, llama.hidden)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        x = x + self.attn(self.attn_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


class Codebook(nn.Module):
    """Predict the next token at every position; the output layer shares the embedding's weight."""

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.llama.vocab, config.llama.width)
        self.layers = nn.ModuleList(CodebookBlock(config) for _ in range(config.llama.layers))
        self.norm = RMSNorm(config.llama.width, config.llama.norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score the next token for ids `[B, S]`; returns logits `[B, S, vocab]`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        rope = rotary_tables(positions, self.config.llama.head_dim, self.config.llama.rope_theta)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, rope)
        return F.linear(self.norm(x), self.embed.weight)


def _inputs(vocab: int, batch: int, seq: int) -> Inputs:
    return (random_tokens(batch, seq, vocab),), {}


ENTRIES = (
    ZooEntry(
        name="codebook-tiny",
        summary="Decoder with codebook features: each head's result becomes the mean of its 4 nearest codes, random weights",
        source="random weights, seed 0",
        license="Apache-2.0",
        build=partial(build_seeded, lambda: Codebook(CodebookConfig.tiny())),
        inputs=partial(_inputs, LlamaConfig.tiny().vocab),
        default_seq=32,
        max_seq=LlamaConfig.tiny().max_seq,
    ),
)
