"""Define a Mixtral decoder: the Llama block with a top-2 mixture of experts in place of the feed-forward layer.

Both spellings of the experts keep every shape static. `dense` runs all experts on all tokens and weights the outputs,
zero outside the top-k; `gathered` fetches each token's own expert weights and multiplies in one batch, which suits
decode. They agree up to rounding. Papers: arXiv:2401.04088 (Mixtral), arXiv:1701.06538 (sparsely gated MoE).
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcompile.models.entry import Inputs, ZooEntry, build_seeded, random_tokens
from effcompile.models.llama import Attention, LlamaConfig, RMSNorm, rotary_tables


@dataclass(frozen=True)
class MixtralConfig:
    """Hold the sizes of a Mixtral; `llama.hidden` is the feed-forward size of one expert."""

    llama: LlamaConfig
    experts: int = 8
    top_k: int = 2
    form: Literal["dense", "gathered"] = "dense"

    @classmethod
    def tiny(cls, form: Literal["dense", "gathered"] = "dense") -> Self:
        """Return the sizes for tests: 2 layers, 4 experts, top 2."""
        return cls(LlamaConfig.tiny(), experts=4, form=form)

    @classmethod
    def base(cls) -> Self:
        """Return realistic sizes: those of Mixtral 8x7B."""
        llama = LlamaConfig(width=4096, layers=32, head_dim=128, hidden=14336, rope_theta=1e6, max_seq=32768)
        return cls(llama)


class Router(nn.Module):
    """Choose experts by softmax and rescale the chosen weights to sum 1."""

    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.top_k = top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Route tokens `[T, C]`; returns weights and expert ids, both `[T, K]`."""
        scores = F.softmax(self.gate(x).float(), dim=-1)
        weights, chosen = torch.topk(scores, self.top_k, dim=-1)
        return (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype), chosen


class Experts(nn.Module):
    """Hold the SwiGLU weights of all experts in two tensors: `[E, 2F, C]` and `[E, C, F]`."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        width, hidden, count = config.llama.width, config.llama.hidden, config.experts
        self.form = config.form
        self.gate_up = nn.Parameter(torch.randn(count, 2 * hidden, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(count, width, hidden) * hidden**-0.5)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Mix experts for tokens x `[T, C]` with weights and ids `[T, K]`; returns `[T, C]`."""
        return self._dense(x, weights, chosen) if self.form == "dense" else self._gathered(x, weights, chosen)

    def _dense(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        count = self.gate_up.shape[0]
        gate, up = torch.bmm(x.expand(count, -1, -1), self.gate_up.transpose(1, 2)).chunk(2, dim=-1)
        out = torch.bmm(F.silu(gate) * up, self.down.transpose(1, 2))
        share = x.new_zeros(x.shape[0], count).scatter(1, chosen, weights)
        return (out * share.t()[:, :, None]).sum(dim=0)

    def _gathered(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        ids = chosen.reshape(-1)
        repeated = x.repeat_interleave(chosen.shape[1], dim=0)
        gate, up = torch.bmm(self.gate_up[ids], repeated[:, :, None]).squeeze(-1).chunk(2, dim=-1)
        out = torch.bmm(self.down[ids], (F.silu(gate) * up)[:, :, None]).squeeze(-1)
        return (out * weights.reshape(-1, 1)).view(*chosen.shape, -1).sum(dim=1)


class SparseMoE(nn.Module):
    """Route every token to its experts and add their answers."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.router = Router(config.llama.width, config.experts, config.top_k)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        flat = x.reshape(-1, x.shape[-1])
        return self.experts(flat, *self.router(flat)).view_as(x)


class MixtralBlock(nn.Module):
    """Add attention and the mixture of experts to the residual stream."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.llama.width, config.llama.norm_eps)
        self.attn = Attention(config.llama)
        self.moe_norm = RMSNorm(config.llama.width, config.llama.norm_eps)
        self.moe = SparseMoE(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        x = x + self.attn(self.attn_norm(x), rope, None)
        return x + self.moe(self.moe_norm(x))


class Mixtral(nn.Module):
    """Predict the next token at every position."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.llama.vocab, config.llama.width)
        self.layers = nn.ModuleList(MixtralBlock(config) for _ in range(config.llama.layers))
        self.norm = RMSNorm(config.llama.width, config.llama.norm_eps)
        self.head = nn.Linear(config.llama.width, config.llama.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score the next token for ids `[B, S]`; returns logits `[B, S, vocab]`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        rope = rotary_tables(positions, self.config.llama.head_dim, self.config.llama.rope_theta)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, rope)
        return self.head(self.norm(x))


def _inputs(vocab: int, batch: int, seq: int) -> Inputs:
    return (random_tokens(batch, seq, vocab),), {}


def _entry(name: str, summary: str, config: MixtralConfig, default_seq: int) -> ZooEntry:
    return ZooEntry(
        name=name,
        summary=summary,
        source="random weights, seed 0",
        license="Apache-2.0",
        build=partial(build_seeded, lambda: Mixtral(config)),
        inputs=partial(_inputs, config.llama.vocab),
        default_seq=default_seq,
        max_seq=config.llama.max_seq,
    )


ENTRIES = (
    _entry("mixtral-tiny", "Mixtral, 4 experts, top 2, dense experts, random weights", MixtralConfig.tiny(), 32),
    _entry(
        "mixtral-tiny-gathered",
        "Mixtral, 4 experts, top 2, gathered expert weights, random weights",
        MixtralConfig.tiny("gathered"),
        32,
    ),
)
