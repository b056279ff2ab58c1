"""Measure a sentence encoder on a padded batch, pooling included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from bench.case import Row, Settings
from bench.model_case import DTYPES, ModelCase
from bench.workload import Workload, place
from effcompile.models import zoo
from effcompile.models.text import pydoc_text, token_windows


@dataclass(frozen=True)
class MiniLM(ModelCase):
    """Embed 32 texts padded to 128 tokens; every second text has 50 tokens, so 69.5 % of the positions are real."""

    name: ClassVar[str] = "minilm"
    title: ClassVar[str] = "MiniLM-L6 sentence embeddings, 32 x 128"
    about: ClassVar[str] = (
        "Unmodified transformers BertModel with the masked mean-pool and unit norm inside the module; half of the "
        "rows have 50 real tokens of 128, so 69.5 % of the positions are real."
    )
    model: str = "minilm-l6"
    batch: int = 32
    length: int = 128
    short: int = 50
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return one row a dtype."""
        wanted = [dtype for dtype in self.dtypes if dtype in settings.dtypes or not settings.dtypes]
        sizes = {"batch": 4 if settings.quick else self.batch, "length": self.length, "short": self.short}
        return [Row(f"{sizes['batch']}x{self.length}-{dtype}", {**sizes, "dtype": dtype}) for dtype in wanted]

    def workload(self, row: Row, settings: Settings) -> Workload:
        """Load the model and pad real text on the right."""
        dtype, batch, length = (
            DTYPES[str(row.parameters["dtype"])],
            int(row.parameters["batch"]),
            int(row.parameters["length"]),
        )
        loaded = zoo.load(self.model, dtype=dtype)
        if loaded.tokenizer is None:
            tokens, pad = loaded.example_inputs(batch, length)[1]["input_ids"], 0
        else:
            tokens, pad = (
                token_windows(loaded.tokenizer, pydoc_text(), length, batch),
                int(loaded.tokenizer.pad_token_id),
            )
        real = torch.tensor([length if number % 2 == 0 else int(row.parameters["short"]) for number in range(batch)])
        mask = (torch.arange(length)[None, :] < real[:, None]).long()
        tokens = torch.where(mask.bool(), tokens, torch.full_like(tokens, pad))
        inputs = {"input_ids": tokens, "attention_mask": mask}
        module, args, kwargs = place(loaded.model, (), inputs, settings.device)
        fill = f"{int(mask.sum())} of {mask.numel()} tokens are real ({100 * float(mask.float().mean()):.1f} %)"
        return Workload(module, args, kwargs, dtype, settings.device, notes=(fill,))
