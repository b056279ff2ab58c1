"""Compile the transformer of a diffusers pipeline: one denoising step of PixArt, with a padded prompt.

    python examples/diffusers_transformer.py
    python examples/diffusers_transformer.py --quick

In a pipeline it is one line: pipe.transformer = torch.compile(pipe.transformer, backend="eff").
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel

import effcompile as eff


def random_pixart(layers: int, heads: int, side: int) -> PixArtTransformer2DModel:
    """Build the stock diffusers class with random weights."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=32,
        cross_attention_dim=32 * heads,
        caption_channels=64,
        sample_size=side,
        use_additional_conditions=False,
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():  # as built, its output layer is zero and would hide every difference
            weight.add_(torch.randn(weight.shape) * 0.02)
    return model


def step(side: int, words: int) -> dict[str, Any]:
    """Make the inputs of one denoising step of two images; the second prompt is shorter than the first."""
    draw = torch.Generator().manual_seed(0)
    prompt = torch.ones(2, words)
    prompt[1, words // 3 :] = 0
    return {
        "hidden_states": torch.randn(2, 4, side, side, generator=draw),
        "encoder_hidden_states": torch.randn(2, words, 64, generator=draw),
        "encoder_attention_mask": prompt,
        "timestep": torch.tensor([500, 500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def seconds(call: Callable[[], object]) -> float:
    """Time one call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main() -> None:
    """Compile, compare with eager, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    side = 16 if args.quick else 64
    model = random_pixart(layers=2 if args.quick else 6, heads=4 if args.quick else 12, side=side)
    inputs = step(side, words=24 if args.quick else 120)

    fast = torch.compile(model, backend="eff")
    with torch.no_grad():
        first = seconds(lambda: fast(**inputs))
        rounds = [(seconds(lambda: model(**inputs)), seconds(lambda: fast(**inputs))) for _ in range(5)]
        difference = (fast(**inputs)[0] - model(**inputs)[0]).abs().max().item()

    report = eff.report()
    sites = [site for graph in report["graphs"] for site in graph["sites"]]
    print(f"{len(sites)} attention sites rewritten, {report['counters'].get('missed', 0)} missed")
    for (keys, mask, kernel), count in Counter(
        (site["kv_len"], site["mask"], site["kernel"]) for site in sites
    ).items():
        print(f"  {count} x {keys} keys, mask {mask}: kernel {kernel}")
    eager, compiled = (statistics.median(column) for column in zip(*rounds))
    print(f"largest difference from eager: {difference:.1e}")
    print(f"first call {first:.1f} s, then {compiled * 1e3:.1f} ms; eager {eager * 1e3:.1f} ms")
    assert difference < 1e-3


if __name__ == "__main__":
    main()
