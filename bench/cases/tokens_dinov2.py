"""Measure what token policies cost in quality and give in speed: DINOv2 on real images, as features for a kNN classifier."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.case import Case, Row, Settings, Watch
from bench.clocks import timer_for
from bench.model_case import DTYPES
from bench.peers import release
from bench.rounds import SETTLE
from bench.stats import Spread, ratios
from effcompile.models import zoo
from effcompile.models.digits import handwritten_digits, pixels

EXACT = "exact"
POLICIES: Mapping[str, str] = {
    "tome-0.5": "tome{ratio=0.5}",
    "tome-0.75": "tome{ratio=0.75}",
    "tome-0.85": "tome{ratio=0.85}",
    "spatten-0.8": "spatten{keep=0.8,pinned=[0]}",
    "spatten-0.6": "spatten{keep=0.6,pinned=[0]}",
    "spatten-0.5": "spatten{keep=0.5,pinned=[0]}",
}
"""What is swept, by the name of its arm."""


class Features(nn.Module):
    """Return the class tokens of some layers side by side, `[B, 3 * C]`."""

    def __init__(self, model: nn.Module, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, images: Tensor) -> Tensor:
        """Encode pixels `[B, 3, 224, 224]`."""
        states = self.model(pixel_values=images, output_hidden_states=True).hidden_states
        return torch.cat([states[layer][:, 0] for layer in self.layers], -1)


@dataclass(frozen=True)
class TokensDinov2(Case):
    """Encode all images in every arm, a batch a round, and classify each one by its nearest others."""

    name: ClassVar[str] = "tokens-dinov2"
    title: ClassVar[str] = "Token policies on DINOv2 ViT-S/14"
    headline: ClassVar[bool] = False
    about: ClassVar[str] = (
        "Unmodified transformers Dinov2Model, trained weights, MNIST digits at 224 x 224 (257 tokens); a round is one batch, which "
        "every arm encodes. Features are the class tokens of layers 9 to 11. accuracy: leave-one-out, 10 nearest (cosine); points: "
        "its difference to the exact arm in percent, with a 95 % interval of the paired differences. cosine: of an arm's features "
        "to the exact ones, mean and 5 % quantile."
    )
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    model: str = "dinov2-s"
    images: int = 2048
    batch: int = 8
    layers: tuple[int, ...] = (9, 10, 11)
    dtypes: tuple[str, ...] = ("float32",)
    policies: Mapping[str, str] = field(default_factory=lambda: POLICIES)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return the exact arm and every policy."""
        return (EXACT, *self.policies)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return one row a dtype."""
        count = 32 if settings.quick else self.images
        wanted = [dtype for dtype in self.dtypes if dtype in settings.dtypes or not settings.dtypes]
        return [Row(f"{count}-{dtype}", {"images": count, "batch": self.batch, "dtype": dtype}) for dtype in wanted]

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure all arms on the same batches, in turn."""
        torch.set_num_threads(settings.threads)
        release()
        load = [os.getloadavg()[0]]
        dtype, count = DTYPES[str(row.parameters["dtype"])], int(row.parameters["images"])
        names = [
            name
            for name in self.chosen_arms(settings)
            if not settings.quick or name in (EXACT, *list(self.policies)[1::3])
        ]
        names = [EXACT, *(name for name in names if name != EXACT)]
        images, labels = (part[:count] for part in handwritten_digits())
        model = Features(zoo.load(self.model, dtype=dtype).model, self.layers).eval()
        batches = [pixels(part, 224).to(dtype) for part in images[: self.batch].split(self.batch)]
        timer = timer_for("cpu")
        calls: dict[str, Callable[[Tensor], Tensor]] = {}
        arms: dict[str, dict[str, Any]] = {}
        samples: dict[str, list[float]] = {name: [] for name in names}
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=len(names) + 2):
            for name in names:
                watch.say(f"compiling {name}")
                begun = time.perf_counter()
                calls[name] = _compiled(model, self.policies.get(name, ""))
                calls[name](batches[0])
                arms[name] = {"compile_seconds": float(f"{time.perf_counter() - begun:.4g}")}
            for part in images.split(self.batch):
                given = pixels(part, 224).to(dtype)
                for name, call in calls.items():
                    time.sleep(SETTLE)
                    seconds, result = timer.time(lambda call=call, given=given: call(given))  # type: ignore[misc]
                    samples[name].append(seconds)
                    found[name].append(result.float())
                    watch.tick(name)
        spreads = {name: Spread(tuple(values)) for name, values in samples.items()}
        features = {name: torch.cat(parts) for name, parts in found.items()}
        right = {name: _correct(values, labels) for name, values in features.items()}
        for name in names:
            told = {
                "policy": self.policies.get(name, ""),
                "images_per_second": round(self.batch / spreads[name].median, 3),
            }
            quality = _compared(features[name], features[EXACT], right[name], right[EXACT])
            arms[name] = {"seconds": spreads[name].to_json(), **told, **arms[name], "quality": quality}
        load.append(os.getloadavg()[0])
        return [
            {
                "id": row.id,
                "parameters": dict(row.parameters),
                "rounds": len(samples[EXACT]),
                "warmup": 1,
                "load": [round(value, 2) for value in load],
                "arms": arms,
                "ratios": ratios(spreads, (EXACT,), ()),
            }
        ]


def _compiled(model: nn.Module, policy: str) -> Callable[[Tensor], Tensor]:
    asked = {"tokens": policy, "require": {"tokens": "all"}} if policy else {}
    run: Callable[[Tensor], Tensor] = torch.compile(
        model, backend="eff", options={"strict": True, **asked}, dynamic=False
    )
    return run


def _correct(features: Tensor, labels: Tensor, nearest: int = 10) -> Tensor:
    """Return which images the others classify right, `[N]` bool: votes of the nearest ones, weighted by cosine."""
    unit = F.normalize(features - features.mean(0), dim=-1)
    likeness = (unit @ unit.T).fill_diagonal_(-2)
    near = likeness.topk(min(nearest, len(labels) - 1), dim=-1)
    votes = torch.zeros(len(labels), 10).scatter_add_(1, labels[near.indices], near.values + 1)
    return votes.argmax(-1) == labels


def _compared(features: Tensor, exact: Tensor, right: Tensor, base: Tensor) -> dict[str, float]:
    """Return accuracy, its paired difference in points with a 95 % interval, and the cosine to exact features."""
    difference = (right.double() - base.double()) * 100
    half = 1.96 * float(difference.std()) / len(difference) ** 0.5
    points, cosine = float(difference.mean()), F.cosine_similarity(features, exact, dim=-1)
    values = {
        "accuracy": float(right.double().mean()),
        "points": points,
        "points_low": points - half,
        "points_high": points + half,
        "cosine": float(cosine.mean()),
        "cosine_5": float(cosine.quantile(0.05)),
    }
    return {name: round(value, 4) for name, value in values.items()}
