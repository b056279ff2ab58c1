"""Measure an image encoder, which has no mask at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from bench.case import Row, Settings
from bench.model_case import DTYPES, ModelCase
from bench.workload import Workload, place
from effcompile.models import zoo


@dataclass(frozen=True)
class Dinov2(ModelCase):
    """Encode 8 images of 224 x 224 pixels, 257 tokens each."""

    name: ClassVar[str] = "dinov2"
    title: ClassVar[str] = "DINOv2 ViT-S/14, 8 images"
    about: ClassVar[str] = (
        "Unmodified transformers Dinov2Model, trained weights, 8 images of 224 x 224 (257 tokens); noise as pixels."
    )
    model: str = "dinov2-s"
    batch: int = 8
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return one row a dtype."""
        batch = 1 if settings.quick else self.batch
        wanted = [dtype for dtype in self.dtypes if dtype in settings.dtypes or not settings.dtypes]
        return [Row(f"{batch}-{dtype}", {"batch": batch, "dtype": dtype}) for dtype in wanted]

    def workload(self, row: Row, settings: Settings) -> Workload:
        """Load the model and draw the images."""
        dtype = DTYPES[str(row.parameters["dtype"])]
        loaded = zoo.load(self.model, dtype=dtype)
        args, kwargs = loaded.example_inputs(int(row.parameters["batch"]))
        return Workload(*place(loaded.model, args, kwargs, settings.device), dtype, settings.device)
