"""Measure the prefill of a trained language model on real text, in the ways that users call it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.case import Row, Settings, grid
from bench.model_case import DTYPES, ModelCase
from bench.workload import Workload, place
from effcompile.models import zoo
from effcompile.models.entry import ZooModel
from effcompile.models.text import pydoc_text, token_windows

FORMS = ("default", "no-cache", "left-padded", "left-padded-1")
SAMPLED = 64
"""Positions of the logits that are compared, evenly spread over the real ones."""


@dataclass(frozen=True)
class SmolLM2Prefill(ModelCase):
    """Run the unmodified transformers class over 512 to 8,192 tokens of Python's documentation.

    Forms: `default` is `model(ids)`; `no-cache` is `model(ids, use_cache=False)`, which makes transformers build an S x
    S mask; `left-padded` is a left-padded batch of two in a bucket of S tokens, with 3/4 and 1/4 of it real (half on
    average); `left-padded-1` is one sequence that fills half of its bucket.
    """

    name: ClassVar[str] = "smollm2-prefill"
    title: ClassVar[str] = "SmolLM2-135M prefill"
    about: ClassVar[str] = (
        "Unmodified transformers LlamaForCausalLM, trained weights, real text, logits of every position. ONNX Runtime "
        "and OpenVINO run the export with use_cache=False in every form. left-padded: batch of 2, 3/4 and 1/4 real "
        "tokens."
    )
    form_words: ClassVar[tuple[str, ...]] = FORMS
    model: str = "smollm2-135m"
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    forms: tuple[str, ...] = ("default", "no-cache", "left-padded")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return length x form x dtype; `left-padded-1` runs when it is asked for."""
        forms = FORMS if settings.forms else self.forms
        return grid(settings, (128,) if settings.quick else self.lengths, forms, self.dtypes)

    def workload(self, row: Row, settings: Settings) -> Workload:
        """Load the model and cut the text."""
        dtype, form, length = (
            DTYPES[str(row.parameters["dtype"])],
            str(row.parameters["form"]),
            int(row.parameters["length"]),
        )
        loaded = zoo.load(self.model, dtype=dtype)
        ids, mask = token_batch(loaded, form, length)
        kwargs: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
        if form == "no-cache":
            kwargs["use_cache"] = False
        module, args, kwargs = place(loaded.model, (ids,), kwargs, settings.device)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return Workload(
            module=module,
            args=args,
            kwargs=kwargs,
            dtype=dtype,
            device=settings.device,
            select=SpreadRows(real),
            export_kwargs=(kwargs | {"use_cache": False}) if loaded.tokenizer is not None else kwargs,
            notes=(f"{int(real.sum())} of {real.numel()} tokens are real ({100 * float(real.float().mean()):.1f} %)",),
        )


def token_batch(loaded: ZooModel, form: str, length: int) -> tuple[Tensor, Tensor | None]:
    """Return token ids `[B, length]` of real text and, for padded forms, the attention mask (0: padding)."""
    fills = {"left-padded": (0.75, 0.25), "left-padded-1": (0.5,)}.get(form)
    rows = len(fills or (1,))
    if loaded.tokenizer is None:  # random weights: the tokens mean nothing anyway
        ids = loaded.example_inputs(rows, length)[0] or (loaded.example_inputs(rows, length)[1]["input_ids"],)
        tokens: Tensor = ids[0]
        pad = 0
    else:
        tokens = token_windows(loaded.tokenizer, pydoc_text(), length, rows)
        pad = int(loaded.tokenizer.pad_token_id)
    if fills is None:
        return tokens, None
    real = torch.tensor([max(1, round(length * fill)) for fill in fills])
    mask = (torch.arange(length)[None, :] >= length - real[:, None]).long()
    return torch.where(mask.bool(), tokens, torch.full_like(tokens, pad)), mask


class SpreadRows:
    """Take up to `SAMPLED` evenly spread real positions of logits `[B, S, V]`."""

    def __init__(self, real: Tensor) -> None:
        places = real.flatten().nonzero().flatten()
        self.places = places[torch.linspace(0, len(places) - 1, min(SAMPLED, len(places))).long()]

    def __call__(self, logits: Tensor) -> Tensor:
        """Return `[n, V]`."""
        return logits.flatten(0, 1)[self.places.to(logits.device)]
