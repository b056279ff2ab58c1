"""Hold small models whose tokens can be shortened, and what shortening means: masks instead of fewer tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A layer that norms before (Llama, ViT) or behind (BERT) its two halves; `rope` rotates queries and keys."""

    def __init__(self, width=32, heads=4, post=False, rope=False, kv_heads=0):
        super().__init__()
        self.heads, self.kv_heads, self.post, self.rope = heads, kv_heads or heads, post, rope
        self.qkv = (
            nn.Linear(width, 3 * width)
            if not kv_heads
            else nn.ModuleList(nn.Linear(width, width // heads * n) for n in (heads, kv_heads, kv_heads))
        )
        self.out = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def heads_of(self, x, turn):
        batch, length, width = x.shape
        parts = self.qkv(x).split(width, -1) if self.kv_heads == self.heads else [project(x) for project in self.qkv]
        q, k, v = (p.view(batch, length, -1, width // self.heads).transpose(1, 2) for p in parts)
        return (rotate(q, turn), rotate(k, turn), v) if self.rope else (q, k, v)

    def joined(self, y):
        return self.out(y.transpose(1, 2).flatten(2))

    def mlp(self, x):
        return self.down(F.gelu(self.up(x)))

    def forward(self, x, mask=None, causal=False, turn=None):
        q, k, v = self.heads_of(x if self.post else self.norm1(x), turn)
        shared = {"enable_gqa": True} if self.kv_heads != self.heads else {}
        y = self.joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, **shared))
        if self.post:
            x = self.norm1(x + y)
            return self.norm2(x + self.mlp(x))
        x = x + y
        return x + self.mlp(self.norm2(x))


def rotate(x, turn):
    half = x.shape[-1] // 2
    cos, sin = turn.cos(), turn.sin()
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Tower(nn.Module):
    """Embed, run layers, norm, and return every token, or the first, or the last one."""

    def __init__(self, depth=4, read="all", causal=False, post=False, rope=False, width=32, heads=4, kv_heads=0):
        super().__init__()
        self.embed = nn.Embedding(60, width)
        self.place = nn.Parameter(torch.randn(1, 64, width) * 0.1)
        self.layers = nn.ModuleList(
            Block(width, heads=heads, post=post, rope=rope, kv_heads=kv_heads) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 7)
        self.read, self.causal, self.post, self.rope = read, causal, post, rope

    def turn(self, length):
        half = self.layers[0].out.in_features // self.layers[0].heads // 2
        angles = torch.arange(length)[:, None] / 100 ** (torch.arange(half) / half)
        return torch.cat([angles, angles], -1)[None, None].to(self.place.dtype)

    def start(self, ids):
        x = self.embed(ids)
        return x if self.rope else x + self.place[:, : ids.shape[1]]

    def forward(self, ids, padding=None):
        x, length = self.start(ids), ids.shape[1]
        mask = None if padding is None else padding[:, None, None, :].bool().expand(-1, 1, length, -1)
        if padding is not None and self.causal:
            mask = mask & torch.ones(length, length, dtype=torch.bool).tril()
        turn = self.turn(length) if self.rope else None
        for layer in self.layers:
            x = layer(x, mask, self.causal and padding is None, turn)
        return self.end(x)

    def end(self, x):
        x = self.head(x if self.post else self.norm(x))
        return x if self.read == "all" else x[:, 0] if self.read == "first" else x[:, -1]


def masked_run(model: Tower, ids: Tensor, lefts, rank, padding=None, pinned=(0, -1), caches=None, heads=None) -> Tensor:
    """Run a tower on all tokens and hide from later layers those that would be dropped; they keep the value that they had.

    `lefts` are the tokens behind each layer's attention; `rank(number, probs, state)` returns scores `[B, N]` from the layer's
    probabilities `[B, H, N, N]` over tokens that are not hidden. A list `caches` takes keys, values and which are left. `heads` are
    the key heads behind each layer; the results of those that would be cut are zeroed.
    """
    x, (batch, length) = model.start(ids), ids.shape
    alive = torch.ones(batch, length, dtype=torch.bool)
    real = alive.clone() if padding is None else padding.bool()
    held = torch.zeros(batch, length, dtype=torch.bool)
    for row in range(batch):
        places = real[row].nonzero()[:, 0]
        held[row, [int(places[p]) for p in pinned]] = True
    turn = model.turn(length) if model.rope else None
    state: dict = {}
    kept = torch.arange(model.layers[0].kv_heads).expand(batch, -1)  # key heads that are left
    gave = torch.zeros(kept.shape, dtype=x.dtype)
    for number, layer in enumerate(model.layers):
        q, k, v = layer.heads_of(x if model.post else layer.norm1(x), turn)
        group = q.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(group, 1) for part in (k, v))
        keep = (alive & real)[:, None, None, :].expand(-1, 1, length, -1)
        if model.causal:
            keep = keep & torch.ones(length, length, dtype=torch.bool).tril()
        if caches is not None:
            caches.append((k[:, ::group], v[:, ::group], alive))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~keep, -math.inf)
        probs = scores.softmax(-1).nan_to_num()
        mine = (kept[..., None] * group + torch.arange(group)).flatten(1)  # query heads of those that are left
        result = (probs @ v) * torch.zeros(q.shape[:2], dtype=x.dtype).scatter(1, mine, 1)[..., None, None]
        y = layer.joined(result)
        if heads is not None:
            counted = (result.abs().sum(-1) * (alive & real)[:, None]).sum(-1).unflatten(1, (-1, group)).sum(-1)
            gave = gave + counted
            best = gave.gather(1, kept).sort(dim=-1, descending=True, stable=True).indices[:, : heads[number]]
        probs = probs.gather(1, mine[..., None, None].expand(-1, -1, *probs.shape[2:]))
        got = rank(number, probs * alive[:, None, :, None], state)
        if heads is not None:
            kept = kept.gather(1, best).sort(dim=-1).values
        summed = layer.norm1(x + y) if model.post else x + y
        summed = torch.where(alive[..., None], summed, x)
        before, after = alive, alive
        if lefts[number] < int(alive[0].sum()):
            got = got.masked_fill(~real, -1.0).masked_fill(held, math.inf).masked_fill(~alive, -math.inf)
            order = got.sort(dim=-1, descending=True, stable=True).indices[:, : lefts[number]]
            after = torch.zeros_like(alive).scatter(1, order, True)
        rest = layer.norm2(summed + layer.mlp(summed)) if model.post else summed + layer.mlp(layer.norm2(summed))
        x = torch.where(after[..., None], rest, summed)
        x = torch.where(before[..., None], x, summed)
        alive = after
    return model.end(x)
