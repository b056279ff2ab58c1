"""Define Duo-LLM's decoder: every layer has a large, a small and no feed-forward layer, and every token takes one of them.

y = x + F_c(norm x), c = 0 large, 1 small, 2 none; attention is the same for all. In training the choice is random, so that any
pattern of choices is a model that works; `oracle_sweep` then runs patterns side by side and says which is best for each token,
which is what routers are judged by. Paper: arXiv:2410.10846.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcompile.models.entry import Inputs, ZooEntry, build_seeded, random_tokens
from effcompile.models.llama import Attention, LlamaConfig, RMSNorm, SwiGLU, rotary_tables

LARGE, SMALL, SKIP = 0, 1, 2


@dataclass(frozen=True)
class DuoConfig:
    """Hold the sizes; `llama.hidden` is the inner width of the large layer, `small` that of the small one."""

    llama: LlamaConfig
    small: int

    @classmethod
    def tiny(cls) -> Self:
        """Return the sizes for tests."""
        return cls(LlamaConfig.tiny(), small=32)

    @classmethod
    def base(cls) -> Self:
        """Return realistic sizes: 12 layers, the small layer a quarter of the large one."""
        llama = LlamaConfig(width=1024, layers=12, heads=16, kv_heads=16, hidden=4096, max_seq=2048)
        return cls(llama, small=1024)


class DuoFFN(nn.Module):
    """Run the layer that each token chose; both layers for all tokens, and a mask."""

    def __init__(self, config: DuoConfig) -> None:
        super().__init__()
        width = config.llama.width
        self.router = nn.Linear(width, 3, bias=False)
        self.large = SwiGLU(width, config.llama.hidden)
        self.small = SwiGLU(width, config.small)

    def forward(self, x: Tensor, choice: Tensor | None) -> Tensor:
        """Map x `[B, S, C]` to the same shape; `choice` `[B, S]` None asks the router, at random in training."""
        if choice is None and self.training:
            choice = torch.randint(0, 3, x.shape[:-1], device=x.device)
        if choice is None:
            choice = self.router(x).argmax(dim=-1)
        which = choice[..., None]
        small = torch.where(which == SMALL, self.small(x), 0.0)
        return torch.where(which == LARGE, self.large(x), small)


class DuoBlock(nn.Module):
    """Add attention and the chosen layer to the residual stream."""

    def __init__(self, config: DuoConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.llama.width, config.llama.norm_eps)
        self.attn = Attention(config.llama)
        self.ffn_norm = RMSNorm(config.llama.width, config.llama.norm_eps)
        self.ffn = DuoFFN(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], choice: Tensor | None) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        x = x + self.attn(self.attn_norm(x), rope, None)
        return x + self.ffn(self.ffn_norm(x), choice)


class Duo(nn.Module):
    """Predict the next token at every position."""

    def __init__(self, config: DuoConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.llama.vocab, config.llama.width)
        self.layers = nn.ModuleList(DuoBlock(config) for _ in range(config.llama.layers))
        self.norm = RMSNorm(config.llama.width, config.llama.norm_eps)
        self.head = nn.Linear(config.llama.width, config.llama.vocab, bias=False)

    def forward(self, tokens: Tensor, choices: Tensor | None = None) -> Tensor:
        """Score the next token for ids `[B, S]`; returns logits `[B, S, vocab]`.

        `choices` `[L, B, S]` says which layer each token takes, from 0 large, 1 small, 2 none; without it the routers do.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        rope = rotary_tables(positions, self.config.llama.head_dim, self.config.llama.rope_theta)
        x = self.embed(tokens)
        for number, layer in enumerate(self.layers):
            x = layer(x, rope, None if choices is None else choices[number])
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Sweep:
    """Hold what patterns of choices lose: `patterns` `[P, L]`, `losses` `[P, B, S - 1]` in nats, the next token known.

    A pattern holds for all tokens of a sequence, so a loss is that of a token whose whole context was computed in the same way.
    """

    patterns: Tensor
    losses: Tensor

    @property
    def best(self) -> Tensor:
        """Return the place of the best pattern of each token, `[B, S - 1]`; of equals the first."""
        return self.losses.argmin(0)

    @property
    def oracle(self) -> float:
        """Return the mean loss where each token has its best pattern."""
        return float(self.losses.min(0).values.mean())

    @property
    def fixed(self) -> Tensor:
        """Return the mean loss of each pattern, `[P]`."""
        return self.losses.flatten(1).mean(1)


def patterns(layers: int, kinds: Sequence[int] = (LARGE, SMALL, SKIP)) -> Tensor:
    """Return every pattern of choices `[len(kinds) ** L, L]`, the first kind everywhere first."""
    return torch.tensor(list(itertools.product(kinds, repeat=layers)))


def oracle_sweep(model: Duo, tokens: Tensor, tried: Tensor | None = None, at_once: int = 32) -> Sweep:
    """Run a model under many patterns of choices, the true tokens given, and return what each token loses under each.

    Args:
        model: in evaluation mode.
        tokens: ids `[B, S]`.
        tried: patterns `[P, L]`; None tries all of large, small and none, 3 ** L of them.
        at_once: patterns that share one call, as further rows of its batch.
    """
    layers = len(model.layers)
    tried = patterns(layers) if tried is None else tried
    losses = [_losses(model, tokens, part) for part in tried.split(at_once)]
    return Sweep(tried, torch.cat(losses))


@torch.no_grad()
def _losses(model: Duo, tokens: Tensor, tried: Tensor) -> Tensor:
    batch, seq = tokens.shape
    rows = tokens.repeat(len(tried), 1)
    choices = tried.t()[:, :, None, None].expand(-1, -1, batch, seq).reshape(tried.shape[1], len(rows), seq)
    logits = model(rows, choices)[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return losses.view(len(tried), batch, seq - 1)


def _inputs(vocab: int, batch: int, seq: int) -> Inputs:
    return (random_tokens(batch, seq, vocab),), {}


ENTRIES = (
    ZooEntry(
        name="duo-tiny",
        summary="Duo-LLM decoder, a large, a small or no feed-forward layer for each token, random weights",
        source="random weights, seed 0",
        license="Apache-2.0",
        build=partial(build_seeded, lambda: Duo(DuoConfig.tiny())),
        inputs=partial(_inputs, LlamaConfig.tiny().vocab),
        default_seq=32,
        max_seq=LlamaConfig.tiny().max_seq,
    ),
)
