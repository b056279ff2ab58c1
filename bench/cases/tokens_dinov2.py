"""Measure what token policies cost in quality and give in speed: DINOv2 on real images, as features for a kNN classifier."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.case import Case, Row, Settings, Watch
from bench.model_case import DTYPES
from bench.peers import release
from bench.stats import ratios
from bench.token_arms import chosen, points, take_turns, token_options
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
    adds_arms: ClassVar[bool] = True
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
        """Measure the exact arm and all others that are asked for on the same batches, in turn."""
        torch.set_num_threads(settings.threads)
        release()
        load = [os.getloadavg()[0]]
        dtype, count = DTYPES[str(row.parameters["dtype"])], int(row.parameters["images"])
        names = chosen(self.chosen_arms(settings), (EXACT,), list(self.policies)[1::3] if settings.quick else None)
        images, labels = (part[:count] for part in handwritten_digits())
        model = Features(zoo.load(self.model, dtype=dtype).model, self.layers).eval()

        def batches() -> Iterator[dict[str, Tensor]]:
            for part in images.split(self.batch):
                yield {"images": pixels(part, 224).to(dtype)}

        policies = {name: self.policies.get(name, "") for name in names}
        turns = take_turns(model, {name: token_options(policy) for name, policy in policies.items()}, batches, watch)
        right = {name: _correct(values, labels) for name, values in turns.found.items()}
        arms = {
            name: {
                "seconds": turns.spreads[name].to_json(),
                "policy": policies[name],
                "images_per_second": round(self.batch / turns.spreads[name].median, 3),
                "compile_seconds": turns.compile_seconds[name],
                "quality": points(right[name], right[EXACT]) | _cosines(turns.found[name], turns.found[EXACT]),
            }
            for name in names
        }
        load.append(os.getloadavg()[0])
        return [
            {
                "id": row.id,
                "parameters": dict(row.parameters),
                "rounds": len(turns.spreads[EXACT].samples),
                "warmup": 1,
                "load": [round(value, 2) for value in load],
                "arms": arms,
                "ratios": ratios(turns.spreads, (EXACT,), ()),
            }
        ]


def _correct(features: Tensor, labels: Tensor, nearest: int = 10) -> Tensor:
    """Return which images the others classify right, `[N]` bool: votes of the nearest ones, weighted by cosine."""
    unit = F.normalize(features - features.mean(0), dim=-1)
    likeness = (unit @ unit.T).fill_diagonal_(-2)
    near = likeness.topk(min(nearest, len(labels) - 1), dim=-1)
    votes = torch.zeros(len(labels), 10).scatter_add_(1, labels[near.indices], near.values + 1)
    return votes.argmax(-1) == labels


def _cosines(features: Tensor, exact: Tensor) -> dict[str, float]:
    """Return the cosine to exact features, the mean over images and the 5 % quantile."""
    cosine = F.cosine_similarity(features, exact, dim=-1)
    return {"cosine": round(float(cosine.mean()), 4), "cosine_5": round(float(cosine.quantile(0.05)), 4)}
