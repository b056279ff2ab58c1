"""Hold the time of replayed attention over a run of a video model against what its schedule allows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.case import Watch
from bench.stats import Spread, ratios
from effcompile.core.density import pairs, visited
from effcompile.integrations.replay import replayed
from effcompile.passes.attention.re_ttention import ReTtention
from effcompile.passes.attention.replay import blocks_of

DENSE, OURS = "dense", "re-ttention"


@dataclass(frozen=True)
class Video:
    """Hold the sizes of one attention: heads of 64 over text and frames of equally many places; and how long a run is."""

    heads: int = 4
    text: int = 226
    frames: int = 13
    places: int = 336
    steps: int = 50

    @property
    def tokens(self) -> int:
        """Count the tokens."""
        return self.text + self.frames * self.places

    @property
    def policy(self) -> ReTtention:
        """Return the policy with the schedule that its paper has for CogVideoX."""
        return ReTtention(warmup=15, period=5, text=self.text, frames=self.frames)


class Attention(nn.Module):
    """Attend, and nothing else."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention of q, k, v `[1, H, N, 64]`."""
        return F.scaled_dot_product_attention(q, k, v)


def ceiling(video: Video, density: float) -> float:
    """Return the share of dense attention that the schedule leaves at a density: refresh steps compute both."""
    work = {"dense": 1.0, "refresh": 1.0 + density, "sparse": density}
    return sum(work[video.policy.phase(number)] for number in range(video.steps)) / video.steps


def densities(video: Video) -> dict[str, float]:
    """Return the density of the band by pairs, and by the blocks that the kernel visits."""
    band, tokens = video.policy.band(video.tokens), video.tokens
    blocks = blocks_of(torch.device("cpu"), torch.float32)
    return {"pairs": pairs(band, tokens, tokens), "blocks": visited(band, tokens, tokens, blocks)}


def share(video: Video, rounds: int, watch: Watch) -> dict[str, Any]:
    """Run every step of a dense and of a replayed run once a round; return both, and their quotient beside the ceilings."""
    draw = torch.Generator().manual_seed(0)
    given = tuple(torch.randn(1, video.heads, video.tokens, 64, generator=draw) for _ in range(3))
    denoiser, plain = replayed(Attention(), video.policy), torch.compile(Attention(), dynamic=False)
    runs: dict[str, list[float]] = {DENSE: [], OURS: []}
    steps: dict[str, list[float]] = {}
    with torch.no_grad():
        plain(*given)
        for number in range(rounds + 1):  # the first one compiles
            denoiser.reset()
            totals = dict.fromkeys(runs, 0.0)
            for _ in range(video.steps):
                for name, call in ((DENSE, plain), (OURS, denoiser)):
                    begun = time.perf_counter()
                    call(*given)
                    taken = time.perf_counter() - begun
                    totals[name] += taken
                    if name == OURS and number:
                        steps.setdefault(denoiser.phases[-1], []).append(taken)
                watch.tick(OURS)
            if number:
                for name, total in totals.items():
                    runs[name].append(total)
    spreads = {name: Spread(tuple(values)) for name, values in runs.items()}
    known = densities(video)
    arms: dict[str, Any] = {name: {"seconds": spread.to_json()} for name, spread in spreads.items()}
    arms[OURS] |= _replay_facts(video, steps, known, denoiser.nbytes)
    arms[OURS]["share"] = Spread(tuple(ours / whole for ours, whole in zip(runs[OURS], runs[DENSE]))).to_json()
    return {"arms": arms, "ratios": ratios(spreads, (DENSE,), ())}


def _replay_facts(
    video: Video, steps: Mapping[str, list[float]], known: Mapping[str, float], nbytes: int
) -> dict[str, Any]:
    return {
        "policy": video.policy.spelled,
        "step_seconds": {phase: Spread(tuple(values)).to_json() for phase, values in steps.items()},
        "ceiling": {tag: round(ceiling(video, density), 4) for tag, density in known.items()},
        "density": {tag: round(density, 4) for tag, density in known.items()},
        "state_bytes": nbytes,
    }
