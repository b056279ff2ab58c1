"""Measure one-token steps with a static KV cache, after a prefill of real text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.case import Row, Settings, grid
from bench.model_case import DTYPES, ModelCase
from bench.workload import Bound, Function, Workload, primary
from effcompile.models import zoo
from effcompile.models.text import pydoc_text, token_windows

_NO_GRAPH = (
    "the call writes into the model's StaticCache; a fixed ONNX graph has no such state, and a rewritten model with "
    "the cache as inputs and outputs would be another module"
)


@dataclass(frozen=True)
class SmolLM2Decode(ModelCase):
    """Feed the true continuation token by token; what a step costs is bound by reading the weights."""

    name: ClassVar[str] = "smollm2-decode"
    title: ClassVar[str] = "SmolLM2-135M decode, StaticCache"
    about: ClassVar[str] = (
        "One-token steps of the unmodified model after an eager prefill; seconds are per token, mean over the steps "
        "of a call."
    )
    unit: ClassVar[str] = "token"
    model: str = "smollm2-135m"
    prefill: int = 512
    steps: int = 32
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return one row a prefill length and dtype."""
        rows = grid(settings, (64,) if settings.quick else (self.prefill,), ("static-cache",), self.dtypes)
        steps = 4 if settings.quick else self.steps
        return [Row(row.id, {**row.parameters, "steps": steps}) for row in rows]

    def workload(self, row: Row, settings: Settings) -> Workload:
        """Load the model and the text; every arm prefills a cache of its own when it is bound."""
        dtype, length, steps = (
            DTYPES[str(row.parameters["dtype"])],
            int(row.parameters["length"]),
            int(row.parameters["steps"]),
        )
        loaded = zoo.load(self.model, dtype=dtype)
        assert loaded.tokenizer is not None
        ids = token_windows(loaded.tokenizer, pydoc_text(), length + steps, 1).to(settings.device)
        return Decode(
            module=loaded.model.to(settings.device),
            args=(ids,),
            kwargs={},
            dtype=dtype,
            device=settings.device,
            no_export=_NO_GRAPH,
            steps=steps,
            notes=(f"{steps} steps after {length} tokens; the cache holds {length + steps}",),
        )


@dataclass(frozen=True)
class Decode(Workload):
    """Make `steps` one-token calls in one timed call; `args` holds prompt and continuation `[1, length + steps]`."""

    def bind(self, function: Function, dtype: torch.dtype) -> Bound:
        """Prefill a cache eagerly and return the calls that follow it; rewinding sets the cache back to the prompt."""
        from transformers import StaticCache

        ids: Tensor = self.args[0]
        length = ids.shape[1] - self.steps
        cache: Any = StaticCache(config=self.module.config, max_cache_len=ids.shape[1])
        # A twin is never compiled, so it can fill its own cache; compiled arms share the module.
        model = self.module if dtype == self.dtype else function
        model(ids[:, :length], past_key_values=cache, use_cache=True)

        def run() -> Tensor:
            logits = []
            for place in range(length, length + self.steps):
                out = function(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
                logits.append(primary(out)[:, -1].clone())  # a CUDA graph writes the next step's over these
            return torch.cat(logits)

        def rewind() -> None:
            for layer in cache.layers:
                layer.cumulative_length.fill_(length)

        return Bound(run, rewind)
