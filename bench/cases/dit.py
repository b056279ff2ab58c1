"""Measure the denoiser of an image generator at a length where attention is most of the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from bench.case import Row, Settings
from bench.model_case import DTYPES, ModelCase
from bench.workload import Workload, place
from effcompile.models import zoo


@dataclass(frozen=True)
class DiT(ModelCase):
    """Denoise one latent of 4,096 tokens with two DiT blocks of XL width."""

    name: ClassVar[str] = "dit"
    title: ClassVar[str] = "DiT, 2 blocks of XL width, 4,096 tokens"
    about: ClassVar[str] = (
        "One denoising call, adaLN-zero blocks 1,152 wide, random weights (speed does not depend on them)."
    )
    model: str = "dit-4k"
    quick_model: str = "dit-tiny"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return one row a dtype."""
        model = self.quick_model if settings.quick else self.model
        tokens = zoo.find(model).default_seq
        wanted = [dtype for dtype in self.dtypes if dtype in settings.dtypes or not settings.dtypes]
        return [Row(f"{tokens}-{dtype}", {"model": model, "tokens": tokens, "dtype": dtype}) for dtype in wanted]

    def workload(self, row: Row, settings: Settings) -> Workload:
        """Build the model and draw a latent."""
        dtype = DTYPES[str(row.parameters["dtype"])]
        loaded = zoo.load(str(row.parameters["model"]), dtype=dtype)
        args, kwargs = loaded.example_inputs(1)
        return Workload(*place(loaded.model, args, kwargs, settings.device), dtype, settings.device)
