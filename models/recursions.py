"""Define Mixture-of-Recursions: a stack of layers that is run several times, each time on fewer of the tokens.

Sharing is `middle_cycle`: the first and the last layer are unique, the `depth` layers between them are one stack that is run
`recursions` times, norms included. Routing is expert-choice: of S tokens recursion r (from 0) keeps max(1, int((R - r) / R * S)),
those of the highest scores among the ones that were kept before. For them x becomes x + alpha * sigmoid(score) * F(x), F being the
whole stack with its residual sums. Keys and values are those of the first recursion (`share_keys`), or each recursion has its own,
of its own tokens alone.

This is how the reference runs it: the stack on every token, and a mask. The pass `prune-queries` runs it on the kept ones.
A choice of the highest scores sees the whole sequence, so a step of decoding cannot repeat it (one token is always the highest of
its sequence): `RecursiveDecoder` compares with a threshold, as training teaches the routers to. Paper: arXiv:2507.10524.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcompile.models.entry import Inputs, ZooEntry, build_seeded, random_tokens
from effcompile.models.llama import Attention, Block, LlamaConfig, RMSNorm, SwiGLU, rotary_tables, rotate

Keys = tuple[Tensor, Tensor]
"""Keys and values of a layer, `[B, Hkv, S, D]` each."""


@dataclass(frozen=True)
class RecursionConfig:
    """Hold the sizes; `llama.layers` counts the layers that a token of full depth passes: 2 + recursions * depth.

    `capacity` overrides the shares of tokens that recursions keep, one for each and never rising.
    """

    llama: LlamaConfig
    recursions: int = 3
    alpha: float = 0.1
    share_keys: bool = True
    capacity: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.recursions < 1 or (self.llama.layers - 2) % self.recursions or self.llama.layers < 3:
            raise ValueError(
                f"{self.llama.layers} layers are no first, no last and {self.recursions} equal runs of layers"
            )
        shares = list(self.shares)
        if (
            len(shares) != self.recursions
            or shares != sorted(shares, reverse=True)
            or not 0 < shares[-1] <= shares[0] <= 1
        ):
            raise ValueError(f"capacities in (0, 1] that do not rise, one for each recursion, not {self.capacity}")

    @property
    def depth(self) -> int:
        """Return the layers of the shared stack."""
        return (self.llama.layers - 2) // self.recursions

    @property
    def shares(self) -> tuple[float, ...]:
        """Return the share of tokens that each recursion keeps."""
        return self.capacity or tuple((self.recursions - r) / self.recursions for r in range(self.recursions))

    def kept(self, tokens: int) -> tuple[int, ...]:
        """Return how many of `tokens` tokens each recursion keeps."""
        return tuple(max(1, int(share * tokens + 1e-9)) for share in self.shares)

    def slot(self, layer: int) -> int:
        """Return which cache the layer `layer` of a token of full depth reads where recursions share keys."""
        last = self.llama.layers - 1
        return 0 if layer == 0 else self.depth + 1 if layer == last else 1 + (layer - 1) % self.depth

    @classmethod
    def tiny(cls, recursions: int = 3, **changes: object) -> Self:
        """Return the sizes for tests."""
        base = LlamaConfig.tiny()
        llama = LlamaConfig(**{**vars(base), "layers": 2 + 2 * recursions})
        return cls(llama, recursions, **changes)  # type: ignore[arg-type]

    @classmethod
    def base(cls, recursions: int = 3) -> Self:
        """Return the paper's sizes of 360 million parameters, at 3 recursions 32 layers from 12."""
        llama = LlamaConfig(
            vocab=49152,
            width=960,
            layers=2 + 30,
            heads=15,
            kv_heads=5,
            head_dim=64,
            hidden=2560,
            rope_theta=1e4,
            max_seq=2048,
        )
        return cls(llama, recursions)


class RecursiveAttention(Attention):
    """Attend to keys that are given, or to those of the tokens themselves."""

    def keys(self, x: Tensor, rope: Keys) -> Keys:
        """Return the keys and values of x `[B, S, C]`."""
        batch, seq, _ = x.shape
        k = rotate(self.k_proj(x).view(batch, seq, -1, self.head_dim).transpose(1, 2), *rope)
        return k, self.v_proj(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)

    def attend(self, x: Tensor, rope: Keys, mask: Tensor | None, given: Keys) -> Tensor:
        """Return what x `[B, S, C]` reads from keys and values; without a mask the pattern is causal."""
        batch, seq, _ = x.shape
        q = rotate(self.q_proj(x).view(batch, seq, -1, self.head_dim).transpose(1, 2), *rope)
        k, v = given
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, seq, -1))


class RecursiveBlock(nn.Module):
    """Add attention and feed-forward to the residual stream, each behind its norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = RecursiveAttention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.hidden)

    def forward(
        self,
        x: Tensor,
        rope: Keys,
        mask: Tensor | None,
        given: Keys | None = None,
        store: Callable[[Tensor, Tensor], Keys] | None = None,
    ) -> tuple[Tensor, Keys]:
        """Map `[B, S, C]` to the same shape; return the keys and values that were read beside it.

        They are `given`, or the tokens' own, which `store` may put to others that it returns.
        """
        normed = self.attn_norm(x)
        keys = self.attn.keys(normed, rope) if given is None else given
        keys = keys if store is None else store(*keys)
        x = x + self.attn.attend(normed, rope, mask, keys)
        return x + self.mlp(self.mlp_norm(x)), keys


class Recursions(nn.Module):
    """Predict the next token at every position; the output layer shares the embedding's weight."""

    def __init__(self, config: RecursionConfig) -> None:
        super().__init__()
        llama = config.llama
        self.config = config
        self.embed = nn.Embedding(llama.vocab, llama.width)
        self.first = Block(llama)
        self.stack = nn.ModuleList(RecursiveBlock(llama) for _ in range(config.depth))
        self.routers = nn.ModuleList(nn.Linear(llama.width, 1, bias=False) for _ in range(config.recursions))
        self.last = Block(llama)
        self.norm = RMSNorm(llama.width, llama.norm_eps)

    def forward(self, tokens: Tensor, routing: Sequence[Tensor] | None = None) -> Tensor:
        """Score the next token for ids `[B, S]`; returns logits `[B, S, vocab]`.

        `routing` says which tokens each recursion keeps, places `[B, k_r]` in rising order, each recursion's among those of the one
        before; without it the routers do.
        """
        return self.trace(tokens, routing)[0]

    def trace(self, tokens: Tensor, routing: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return the logits, and which tokens each recursion kept."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        rope = rotary_tables(positions, self.config.llama.head_dim, self.config.llama.rope_theta)
        x = self.first(self.embed(tokens), rope, None)
        shared: list[Keys] | None = None
        kept: Tensor | None = None
        chosen: list[Tensor] = []
        for number, count in enumerate(self.config.kept(tokens.shape[1])):
            scores = self.score(number, x)
            index = self.choose(scores, kept, count) if routing is None else routing[number]
            chosen.append(index)
            kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, index, True)
            mask = None
            if not self.config.share_keys:
                mask = (positions[None, :] <= positions[:, None])[None, None] & kept[:, None, None, :]
            out, keys = self.run(x, rope, mask, shared)
            if self.config.share_keys:
                shared = keys
            share = self.config.alpha * torch.sigmoid(scores)
            x = torch.where(kept[..., None], x + share[..., None].to(x.dtype) * out, x)
        return F.linear(self.norm(self.last(x, rope, None)), self.embed.weight), chosen

    def score(self, number: int, x: Tensor) -> Tensor:
        """Return the router's scores `[B, S]` of tokens x `[B, S, C]`, in float32 at least."""
        scores = self.routers[number](x).squeeze(-1)
        return scores.float() if scores.dtype.itemsize < 4 else scores

    def choose(self, scores: Tensor, kept: Tensor | None, count: int) -> Tensor:
        """Return the places `[B, count]`, in rising order, of the highest scores among the tokens that are kept so far."""
        if kept is not None:
            scores = scores.masked_fill(~kept, -torch.inf)
        return scores.topk(count, dim=1).indices.sort(dim=1).values

    def run(
        self, x: Tensor, rope: Keys, mask: Tensor | None, given: Sequence[Keys] | None
    ) -> tuple[Tensor, list[Keys]]:
        """Run the stack on `[B, S, C]`; returns the keys and values of each of its layers beside the result."""
        keys = []
        for number, layer in enumerate(self.stack):
            x, made = layer(x, rope, mask, None if given is None else given[number])
            keys.append(made)
        return x, keys

    @torch.no_grad()
    def route(self, tokens: Tensor) -> list[Tensor]:
        """Return which tokens each recursion keeps: what `forward` takes as `routing`."""
        return self.trace(tokens)[1]


def _inputs(vocab: int, batch: int, seq: int) -> Inputs:
    return (random_tokens(batch, seq, vocab),), {}


ENTRIES = (
    ZooEntry(
        name="recursions-tiny",
        summary="Mixture-of-Recursions decoder, 2 layers run up to 3 times, a token as often as its router says, random weights",
        source="random weights, seed 0",
        license="Apache-2.0",
        build=partial(build_seeded, lambda: Recursions(RecursionConfig.tiny())),
        inputs=partial(_inputs, LlamaConfig.tiny().vocab),
        default_seq=32,
        max_seq=LlamaConfig.tiny().max_seq,
    ),
)
