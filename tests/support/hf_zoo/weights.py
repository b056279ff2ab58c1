"""Build tiny models whose attention is far from uniform."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Draw every weight anew, large enough that a wrong mask or a lost bias shows in the output.

    The initialization that models come with gives logits near zero, hence attention that is almost uniform, and sets
    gates and relative position tables to zero. Works in place and returns the model in eval mode.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=draw, dtype=weight.dtype)
            if weight.ndim >= 2:
                weight.copy_(noise * (1.5 / math.sqrt(weight[0].numel())))
            else:
                weight.add_(noise * 0.1)
    return model.eval()


def hugging_face(config: str, model: str, **fields: Any) -> Callable[[], nn.Module]:
    """Return a builder of the transformers class `model` from the class `config` with `fields`."""
    return functools.partial(_build_transformers, config, model, fields)


def diffusion(model: str, **fields: Any) -> Callable[[], nn.Module]:
    """Return a builder of the diffusers class `model` with `fields`."""
    return functools.partial(_build_diffusers, model, fields)


def _build_transformers(config: str, model: str, fields: dict[str, Any]) -> nn.Module:
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = getattr(transformers, model)(getattr(transformers, config)(**fields))
    return randomize(built, seed=0)


def _build_diffusers(model: str, fields: dict[str, Any]) -> nn.Module:
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = getattr(diffusers, model)(**fields)
    return randomize(built, seed=0)
