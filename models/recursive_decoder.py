"""Decode with Mixture-of-Recursions: a token goes on to the next recursion where its score says so, in batches of few sizes.

Expert-choice keeps the highest scores of a sequence. A step of decoding has one token of each sequence, which is always the
highest, so that every token would go to full depth. Here a token goes on where sigmoid(score) reaches a threshold: routers are
trained to tell in that way whether they would choose a token (the auxiliary loss of arXiv:2507.10524). The tokens of a batch that
go on are gathered into the next larger of a few sizes, so that each size is compiled once; where none goes on nothing is run.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcompile.models.llama import KVCache, rotary_tables
from effcompile.models.recursions import Recursions


class RecursiveDecoder(nn.Module):
    """Run a model whose recursions share keys with static caches, one for each layer that is there and not for each depth.

    `sizes` are the batches that a recursion runs on; by default a quarter, a half and all of `batch`. `region` maps the function
    that is run on such a batch, to compile it: `lambda f: torch.compile(f, backend="eff", dynamic=False)`.
    """

    def __init__(
        self,
        model: Recursions,
        batch: int,
        length: int,
        threshold: float = 0.5,
        sizes: Sequence[int] = (),
        region: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda function: function,
    ) -> None:
        super().__init__()
        if not model.config.share_keys:
            raise ValueError(
                "a step reads the keys of the first recursion; the model's recursions have keys of their own"
            )
        llama, like = model.config.llama, model.embed.weight
        self.model, self.length, self.threshold = model, length, threshold
        self.sizes = tuple(sorted({*(sizes or (-(-batch // 4), -(-batch // 2))), batch}))
        self.caches = nn.ModuleList(
            KVCache(batch, llama.kv_heads, length, llama.head_dim, like) for _ in range(model.config.depth + 2)
        )
        self._region = region(self._again)

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Score the next token of ids `[B, S]`, with expert-choice, and fill the caches; returns logits `[B, S, vocab]`."""
        model, positions = self.model, torch.arange(tokens.shape[1], device=tokens.device)
        rope, mask = self._rope(positions), self._mask(positions)
        x = model.first(model.embed(tokens), rope, mask, self.caches[0], positions)
        keys = None
        kept: Tensor | None = None
        for number, count in enumerate(model.config.kept(tokens.shape[1])):
            scores = model.score(number, x)
            kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, model.choose(scores, kept, count), True)
            out, keys = model.run(x, rope, None, keys)
            x = torch.where(kept[..., None], self._weighed(x, scores, out), x)
        assert keys is not None
        for cache, pair in zip(self.caches[1:-1], keys):
            cache.update(positions, *pair)
        return self._logits(model.last(x, rope, mask, self.caches[-1], positions))

    @torch.no_grad()
    def step(self, tokens: Tensor, position: int) -> tuple[Tensor, list[int]]:
        """Score the token behind ids `[B, 1]` at `position`; returns logits `[B, 1, vocab]` and the tokens of each recursion."""
        model, positions = self.model, torch.tensor([position], device=tokens.device)
        rope, mask = self._rope(positions), self._mask(positions)
        x = model.first(model.embed(tokens), rope, mask, self.caches[0], positions)
        active = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        counts = []
        for number in range(model.config.recursions):
            scores = model.score(number, x)
            if number:  # the first recursion makes the keys that the others read
                active = active & (torch.sigmoid(scores[:, 0]) >= self.threshold)
            rows = active.nonzero().squeeze(1)
            counts.append(len(rows))
            if not len(rows):
                continue
            if not number:
                out = self._first(x, rope, mask, positions)
                x = self._weighed(x, scores, out)
                continue
            size = next(size for size in self.sizes if size >= len(rows))
            index = torch.cat([rows, rows[:1].expand(size - len(rows))])  # a row twice is computed twice, alike
            x = x.index_copy(0, index, self._region(x[index], index, scores[index], *rope, mask))
        return self._logits(model.last(x, rope, mask, self.caches[-1], positions)), counts

    def _first(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, positions: Tensor) -> Tensor:
        for layer, cache in zip(self.model.stack, self.caches[1:-1]):
            x, _ = layer(x, rope, mask, store=partial(cache.update, positions))
        return x

    def _again(self, x: Tensor, index: Tensor, scores: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Return tokens x `[b, 1, C]`, those of rows `index` of the batch, behind another recursion."""
        out = x
        for layer, cache in zip(self.model.stack, self.caches[1:-1]):
            out, _ = layer(out, (cos, sin), mask, (cache.k[index], cache.v[index]))
        return self._weighed(x, scores, out)

    def _weighed(self, x: Tensor, scores: Tensor, out: Tensor) -> Tensor:
        share = self.model.config.alpha * torch.sigmoid(scores)
        return x + share[..., None].to(x.dtype) * out

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self.model.norm(x), self.model.embed.weight)

    def _rope(self, positions: Tensor) -> Any:
        llama = self.model.config.llama
        return rotary_tables(positions, llama.head_dim, llama.rope_theta)

    def _mask(self, positions: Tensor) -> Tensor:
        slots = torch.arange(self.length, device=positions.device)
        return (slots[None, :] <= positions[:, None])[None, None]
