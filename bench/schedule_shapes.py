"""Hold what schedules take against what `estimate` says, on denoisers with the shapes of known ones and random weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import effcompile as eff
from bench.case import Watch
from bench.stats import Spread, ratios
from effcompile.core.schedule import Size
from effcompile.integrations.sampler import PlannedSampler
from effcompile.models.dit import DiT, DiTConfig
from effcompile.models.trained import require
from effcompile.runtime.processes import VariancePreserving

Json = dict[str, Any]
SHAPED: Mapping[str, tuple[str, str]] = {
    "plain-10": ("plain{steps=10}", ""),
    "bottleneck-2-6-4": ("bottleneck{steps=[2,6,4]}", ""),
    "low-high-10": ("predict-x0{steps=10,scales=[0.5,1.0],until=[0.5]}", ""),
    "plain-10-taylor": ("plain{steps=10}", "taylor{interval=3,warmup=2}"),
}
"""(schedule, cache) of the arms."""


@dataclass(frozen=True)
class Shape:
    """Hold a denoiser: what is known of it, what it is called with beside latent and time, and how it differs from its model."""

    of: eff.Denoising
    model: nn.Module
    channels: int
    arguments: tuple[Tensor, ...]
    more: Mapping[str, Any]
    scaled: str


def dit_xl(layers: int = 4, width: int = 1152, heads: int = 16) -> Shape:
    """Return DiT-XL with 1,024 tokens, or 256 in a low stage, and fewer layers."""
    config = DiTConfig(latent=64, others=(32,), width=width, heads=heads, layers=layers, zero_init=False)
    torch.manual_seed(0)
    model = DiT(config).eval()
    of = eff.Denoising((64, 64), shift=2.0, least=(32, 32), patch=2, multiple=2, width=width)
    return Shape(of, model, config.channels, (torch.tensor([1]),), {}, f"{layers} layers of 28")


class Video(nn.Module):
    """Call CogVideoX's transformer with frames behind channels, as latents lie in a sampler."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, latent: Tensor, time: Tensor, text: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Return v for latents `[B, C, F, H, W]`, times `[B]` and text `[B, 226, E]`; rotations are of the size."""
        rotations = (cosines, sines)
        out: Tensor = self.inner(latent.transpose(1, 2), text, time, image_rotary_emb=rotations, return_dict=False)[0]
        return out.transpose(1, 2)


def cogvideox(layers: int = 2, heads: int = 16, frames: int = 5, height: int = 32, width: int = 48) -> Shape:
    """Return CogVideoX with rotations, variance preserving, in fewer layers, heads, frames and smaller pictures."""
    diffusers = require("diffusers", "diffusers")
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    torch.manual_seed(0)
    inner = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        num_layers=layers,
        text_embed_dim=512,
        sample_width=width,
        sample_height=height,
        sample_frames=4 * (frames - 1) + 1,
        use_rotary_positional_embeddings=True,
    ).eval()

    def rotations(size: Size) -> dict[str, Tensor]:
        count, *edges = size
        grid = [edge // 2 for edge in edges]
        made = get_3d_rotary_pos_embed(64, ((0, 0), tuple(grid)), tuple(grid), count)
        return {"cosines": made[0], "sines": made[1]}

    size = (frames, height, width)
    least = (frames, height // 2, width // 2)
    of = eff.Denoising(size, 50, process="vp", least=least, patch=2, multiple=2, width=64 * heads, text=226)
    text = torch.randn(1, 226, 512, generator=torch.Generator().manual_seed(0))
    more = {"conditions": rotations, "process": VariancePreserving.scaled_linear(prediction="v")}
    scaled = f"{layers} layers of 42, {heads} heads of 48, {of.tokens(size)} tokens and 226 of text"
    return Shape(of, Video(inner), 16, (text,), more, scaled)


SHAPES: Mapping[str, Callable[[], Shape]] = {"dit-xl": dit_xl, "cogvideox": cogvideox}


def estimates(shape: Shape, names: Sequence[str], rounds: int, watch: Watch) -> Json:
    """Run every arm once a round, and beside it one step in each of its sizes; return walls over estimates.

    `measured` is `estimate(seconds)` with the seconds of those steps, `modelled` the work that `estimate()` counts times the
    seconds of a step in full size.
    """
    compiled = torch.compile(shape.model, backend="eff", dynamic=False)
    walls: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, dict[str, list[float]]] = {name: {"measured": [], "modelled": []} for name in names}
    samplers: dict[str, PlannedSampler] = {}
    for name in names:
        schedule, cache = SHAPED[name]
        samplers[name] = eff.sampler(compiled, shape.of, schedule=schedule, cache=cache or None, **shape.more)
        watch.say(f"compiling {name}")
        _step(samplers[name], shape)
    for _ in range(rounds):
        for name, sampler in samplers.items():
            before = _step(sampler, shape)
            begun = time.perf_counter()
            _run(sampler, shape)
            walls[name].append(time.perf_counter() - begun)
            after = _step(sampler, shape)
            seconds = {size: (before[size] + after[size]) / 2 for size in before}
            known = sampler.estimate(seconds).seconds
            assert known is not None, "seconds were given"
            found[name]["measured"].append(walls[name][-1] / known)
            modelled = sampler.estimate().full_steps * seconds[shape.of.size]
            found[name]["modelled"].append(walls[name][-1] / modelled)
            watch.tick(name)
    spreads = {name: Spread(tuple(values)) for name, values in walls.items()}
    arms = {
        name: {
            "seconds": spreads[name].to_json(),
            "policy": " + ".join(part for part in SHAPED[name] if part),
            "full_steps": round(samplers[name].estimate().full_steps, 3),
            "over_estimate": {tag: Spread(tuple(values)).to_json() for tag, values in found[name].items()},
        }
        for name in names
    }
    return {"arms": arms, "ratios": ratios(spreads, tuple(names)[:1], ()), "scaled": shape.scaled}


def _step(sampler: PlannedSampler, shape: Shape) -> dict[Size, float]:
    return sampler.measure(1, shape.channels, *shape.arguments, runs=1)


def _run(sampler: PlannedSampler, shape: Shape) -> Tensor:
    with torch.no_grad():
        return sampler((1, shape.channels), *shape.arguments, generator=torch.Generator().manual_seed(0))
