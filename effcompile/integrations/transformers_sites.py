"""Say which layers of a transformers model keep keys and values, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from effcompile.core.site import CacheSite

Latents = Mapping[int, tuple[int, int]]
"""Channels of the latent and of the rotated key of each layer that keeps those instead of keys and values, by its number."""


def sites(
    config: Any, capacity: int | None, dtype: str = "", latents: Latents = MappingProxyType({})
) -> list[CacheSite | tuple[str, dict[str, Any]]]:
    """Return a cache site for every layer that keeps keys and values, and (type, arguments) of transformers' own for the others."""
    text = config.get_text_config(decoder=True)
    kinds, arguments = _layer_types(text)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    depth = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    found: list[CacheSite | tuple[str, dict[str, Any]]] = []
    for number, (kind, given) in enumerate(zip(kinds, arguments)):
        if kind in ("full_attention", "sliding_attention", "chunked_attention"):
            latent = latents.get(number)
            found.append(
                CacheSite(
                    f"layers.{number}.cache",
                    "cache",
                    "decode",
                    "",
                    kv_heads=heads if latent is None else 1,
                    head_dim=depth if latent is None else latent[0],
                    value_dim=depth if latent is None else latent[1],
                    layout="heads" if latent is None else "mla",
                    capacity=capacity or 0,
                    window=int(given.get("sliding_window") or 0),
                    dtype=dtype,
                )
            )
        else:
            found.append((kind, given))
    return found


def _layer_types(text: Any) -> tuple[list[str], list[dict[str, Any]]]:
    from transformers import cache_utils

    if hasattr(cache_utils, "get_layer_types_and_kwargs"):
        kinds, arguments = cache_utils.get_layer_types_and_kwargs(text)
        return list(kinds), list(arguments)
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
    window = getattr(text, "sliding_window", None)
    return kinds, [{"sliding_window": window} if kind == "sliding_attention" else {} for kind in kinds]
