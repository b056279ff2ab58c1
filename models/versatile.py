"""Define VersatileFFN, a feed-forward layer that is deep for some tokens and wide for others, and a decoder made of it.

One SwiGLU serves twice. Deep: h + FFN(norm h), repeated up to D times; a router says how often for each token. Wide: experts that
are slices of its inner width, top 2 of 8. A token that loops less gets more of the wide path. Paper: arXiv:2512.14531.

Two spellings of evaluation agree up to rounding. `gathered`, the authors': as many loops as any token of the batch needs, and each
expert on the tokens that chose it; both ask the host. `static`: all loops and all experts for every token, in one graph.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcompile.models.entry import Inputs, ZooEntry, build_seeded, random_tokens
from effcompile.models.llama import Attention, LlamaConfig, RMSNorm, SwiGLU, rotary_tables

Form = Literal["gathered", "static"]


@dataclass(frozen=True)
class VersatileConfig:
    """Hold the sizes; `llama.hidden` is the inner width, which `experts` divides."""

    llama: LlamaConfig
    experts: int = 8
    top_k: int = 2
    depth: int = 4
    form: Form = "static"

    @classmethod
    def tiny(cls, form: Form = "static") -> Self:
        """Return the sizes for tests."""
        return cls(LlamaConfig.tiny(), form=form)

    @classmethod
    def base(cls, form: Form = "static") -> Self:
        """Return the sizes of the paper's smaller model: 15 layers of width 1,024."""
        return cls(LlamaConfig(width=1024, layers=15, heads=16, kv_heads=16, hidden=2816, max_seq=2048), form=form)


class VersatileFFN(nn.Module):
    """Add the deep and the wide path of one feed-forward layer, token by token; its residual is inside."""

    tau: Tensor

    def __init__(self, config: VersatileConfig) -> None:
        super().__init__()
        width = config.llama.width
        self.config = config
        self.norm = RMSNorm(width, config.llama.norm_eps)
        self.ffn = SwiGLU(width, config.llama.hidden)
        self.depth_router = nn.Linear(width, config.depth, bias=False)
        self.width_router = nn.Linear(width, config.experts, bias=False)
        self.register_buffer("tau", torch.tensor(5.0))  # of the Gumbel softmax; a trainer lowers it to 0.1

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        if self.training:
            return self._trained(x)
        last = self.depth_router(x).argmax(dim=-1)
        if self.config.form == "static":
            return self._static(x, last)
        return self._gathered(x, last)

    def _shares(self, x: Tensor) -> Tensor:
        logits = self.width_router(x)
        values, ids = torch.topk(logits, self.config.top_k, dim=-1)
        return torch.zeros_like(logits).scatter(-1, ids, F.softmax(values, dim=-1))

    def _expert(self, n: Tensor, expert: int) -> Tensor:
        size = self.config.llama.hidden // self.config.experts
        first, end = expert * size, (expert + 1) * size
        inner = F.silu(F.linear(n, self.ffn.gate_proj.weight[first:end])) * F.linear(
            n, self.ffn.up_proj.weight[first:end]
        )
        return F.linear(inner, self.ffn.down_proj.weight[:, first:end])

    def _states(self, x: Tensor, loops: int) -> Tensor:
        state, states = x, []
        for _ in range(loops):
            state = state + self.ffn(self.norm(state))
            states.append(state)
        return torch.stack(states, dim=-2)

    def _static(self, x: Tensor, last: Tensor) -> Tensor:
        shares = self._shares(x)
        deep = self._states(x, self.config.depth)
        deep = deep.gather(-2, last[..., None, None].expand(*last.shape, 1, x.shape[-1])).squeeze(-2)
        n = self.norm(x)
        wide = torch.zeros_like(x)
        for expert in range(self.config.experts):
            wide = wide + shares[..., expert : expert + 1] * (x + self._expert(n, expert))
        lam = ((self.config.depth - (last + 1)) / self.config.depth).to(x.dtype)[..., None]
        return (1 - lam) * deep + lam * wide

    def _gathered(self, x: Tensor, last: Tensor) -> Tensor:
        deep = self._states(x, int(last.max().item()) + 1)
        deep = deep.gather(-2, last[..., None, None].expand(*last.shape, 1, x.shape[-1])).squeeze(-2)
        lam = ((self.config.depth - (last + 1)) / self.config.depth).to(x.dtype)[..., None]
        shares = self._shares(x) * (lam > 0)
        n, wide = self.norm(x), torch.zeros_like(x)
        for expert in range(self.config.experts):
            chosen = shares[..., expert] > 0
            answer = x[chosen] + self._expert(n[chosen], expert)
            wide[chosen] += shares[..., expert][chosen][:, None] * answer
        return (1 - lam) * deep + lam * wide

    def _trained(self, x: Tensor) -> Tensor:
        depth = self.config.depth
        chosen = F.gumbel_softmax(self.depth_router(x), tau=float(self.tau), hard=True, dim=-1)
        deep = (self._states(x, depth) * chosen[..., None]).sum(-2)
        loops = (chosen * torch.arange(1, depth + 1, device=x.device, dtype=x.dtype)).sum(-1, keepdim=True)
        shares, n = self._shares(x), self.norm(x)
        parts = [shares[..., e : e + 1] * (x + self._expert(n, e)) for e in range(self.config.experts)]
        lam = (depth - loops) / depth
        return (1 - lam) * deep + lam * torch.stack(parts).sum(0)


class VersatileBlock(nn.Module):
    """Add attention to the residual stream, then run the layer, which has its own residual."""

    def __init__(self, config: VersatileConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.llama.width, config.llama.norm_eps)
        self.attn = Attention(config.llama)
        self.ffn = VersatileFFN(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        return self.ffn(x + self.attn(self.attn_norm(x), rope, None))


class Versatile(nn.Module):
    """Predict the next token at every position."""

    def __init__(self, config: VersatileConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.llama.vocab, config.llama.width)
        self.layers = nn.ModuleList(VersatileBlock(config) for _ in range(config.llama.layers))
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


ENTRIES = (
    ZooEntry(
        name="versatile-tiny",
        summary="VersatileFFN decoder, up to 4 loops, 8 virtual experts, top 2, random weights",
        source="random weights, seed 0",
        license="Apache-2.0",
        build=partial(build_seeded, lambda: Versatile(VersatileConfig.tiny())),
        inputs=partial(_inputs, LlamaConfig.tiny().vocab),
        default_seq=32,
        max_seq=LlamaConfig.tiny().max_seq,
    ),
)
