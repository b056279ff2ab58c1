"""Prepare a loaded model for `--kv` and `--evict`."""

from __future__ import annotations

from typing import Any

import torch

from effcompile.cli.models import LoadedModel
from effcompile.core.errors import EffError


def with_cache(loaded: LoadedModel, kv: str | None, evict: str | None) -> LoadedModel:
    """Let a model keep its KV cache as asked, with place for the tokens of the call; without a wish it stays as it is.

    Raises:
        EffError: EFF-K205 for what is no transformers model, and what `eff.prepare` refuses.
    """
    if kv is None and evict is None:
        return loaded
    from effcompile.integrations.transformers import prepare

    if not hasattr(loaded.model, "config") or not isinstance(loaded.model, torch.nn.Module):
        raise EffError(
            "EFF-K205",
            f"{loaded.name} is no transformers model, whose cache --kv and --evict are about",
            hint="a Hugging Face folder, zoo:smollm2-135m, or package.module:callable",
        )
    prepare(loaded.model, kv=kv, evict=evict, capacity=_tokens(loaded))
    return loaded


def _tokens(loaded: LoadedModel) -> int | None:
    given: list[Any] = [*loaded.args[:1], loaded.kwargs.get("input_ids")]
    return next((int(x.shape[1]) for x in given if isinstance(x, torch.Tensor) and x.dim() == 2), None)
