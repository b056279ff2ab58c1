"""Measure how large keys and values of a transformers model get."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effcompile.core.errors import EffError
from effcompile.core.ranges import Ranges


def calibrate_kv(model: nn.Module, samples: Iterable[Tensor | Mapping[str, Any]], path: str | Path) -> Ranges:
    """Run a model over samples, and write the largest magnitude of every channel of keys and values to a file.

    Args:
        model: a transformers model that generates text, prepared or not; it runs with its own cache.
        samples: token ids `[B, S]`, or the keyword arguments of a call. Layers with a sliding window show their last tokens only.
        path: the JSON file, for `static-channel{ranges=PATH}`.

    Raises:
        EffError: EFF-K207 without samples, or where the model returns no keys and values.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    prepared = model.__dict__.pop("_eff_kv", None)
    try:
        for sample in samples:
            given = dict(sample) if isinstance(sample, Mapping) else {"input_ids": sample}
            with torch.no_grad():
                cache = getattr(model(**given, use_cache=True), "past_key_values", None)
            for number, layer in enumerate(getattr(cache, "layers", ())):
                held = [getattr(layer, name, None) for name in ("keys", "values")]
                if not all(isinstance(x, Tensor) and x.dim() == 4 for x in held):
                    continue  # a layer that keeps another state
                most = [x.detach().abs().amax((0, 2)).float().cpu() for x in held if x is not None]
                before = found.get(number, (most[0], most[1]))
                found[number] = (torch.maximum(before[0], most[0]), torch.maximum(before[1], most[1]))
    finally:
        if prepared is not None:
            model.__dict__["_eff_kv"] = prepared
    if not found:
        raise EffError(
            "EFF-K207",
            "no sample gave keys and values",
            hint="samples of token ids [B, S], for a model with a KV cache",
        )
    ranges = Ranges(found)
    ranges.save(path)
    return ranges
