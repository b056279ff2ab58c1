"""Compile a GPT whose attention is written out by hand: product, triangular buffer, softmax, product.

    python examples/nanogpt.py
    python examples/nanogpt.py --quick

The buffer is read element by element while compiling and proved to be causal; it is watched from then on, so that a
program that changes it later still gets the right answer. The example does exactly that at its end.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import effcompile as eff


class Attention(nn.Module):
    """Attend causally, the way teaching code does."""

    tril: Tensor

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.register_buffer("tril", torch.tril(torch.ones(length, length)))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
        scores = scores.masked_fill(self.tril[:length, :length] == 0, float("-inf"))
        y = scores.softmax(dim=-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Add attention and feed-forward to the residual stream."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, length)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Score the next of 256 byte values."""

    def __init__(self, layers: int, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, length) for _ in range(layers))
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits `[B, S, 256]` for tokens `[B, S]`."""
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def seconds(call: Callable[[], object]) -> float:
    """Time one call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main() -> None:
    """Compile, compare with eager, change the mask, and compare again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    length = 128 if args.quick else 1024
    torch.manual_seed(0)
    model = GPT(layers=3 if args.quick else 6, width=64 if args.quick else 384, heads=4, length=length).eval()
    tokens = torch.randint(0, 256, (1, length))

    # require: fail with a list of reasons rather than run with an attention that was not recognized
    fast = torch.compile(model, backend="eff", options={"require": {"attention": "all"}})
    with torch.no_grad():
        first = seconds(lambda: fast(tokens))
        rounds = [(seconds(lambda: model(tokens)), seconds(lambda: fast(tokens))) for _ in range(5)]
        difference = (fast(tokens) - model(tokens)).abs().max().item()

    report = eff.report()
    for graph in report["graphs"]:
        for site in graph["sites"]:
            print(f"{site['id']}: {site['idiom']}, mask {site['mask']}, kernel {site['kernel']}")
    eager, compiled = (statistics.median(column) for column in zip(*rounds))
    print(f"largest difference from eager: {difference:.1e}")
    print(f"first call {first:.1f} s, then {compiled * 1e3:.1f} ms; eager {eager * 1e3:.1f} ms")

    with torch.no_grad():
        for block in model.blocks:
            block.attn.tril.copy_(torch.ones(length, length).tril(3))  # may look three tokens ahead now
        changed = (fast(tokens) - model(tokens)).abs().max().item()
    print(f"after the mask buffers changed: {changed:.1e}; {eff.report()['notices'][-1]}")
    assert difference < 1e-3
    assert changed < 1e-3


if __name__ == "__main__":
    main()
