"""Put compressed layers into transformers' `Cache`.

The classes derive from transformers', so they are made in a function: importing this module imports nothing of it.
"""

from __future__ import annotations

import functools
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from effcompile.core.cache import CacheFormat
from effcompile.core.errors import EffError
from effcompile.core.eviction import CacheEviction, Rotation
from effcompile.core.site import CacheSite
from effcompile.integrations.transformers_held import Held
from effcompile.integrations.transformers_sites import Latents, sites
from effcompile.ops.kv.refuse import refused
from effcompile.passes.kv.sink_window import SinkWindow
from effcompile.runtime.eviction import EvictingCache
from effcompile.runtime.kv_cache import LayerCache
from effcompile.runtime.mixed import MixedCache
from effcompile.runtime.paged import PagedCache, Reading
from effcompile.runtime.sliding import ROOM, SlidingCache


def build(
    made: tuple[Any, Any],
    config: Any,
    form: CacheFormat,
    capacity: int | None,
    evict: CacheEviction | None = None,
    rotation: Rotation | None = None,
    reading: Reading | None = None,
    latents: Latents = MappingProxyType({}),
) -> Any:
    """Return a cache of the classes `made` for a model's configuration; layers without keys and values are transformers' own."""
    from transformers import cache_utils

    cache_class, layer_class = made
    layers: list[Any] = []
    for site in sites(config, capacity, latents=latents):
        if isinstance(site, CacheSite):
            layers.append(layer_class(_tokens(form, site, evict, rotation, reading)))
            continue
        kind, given = site
        mapping = getattr(cache_utils, "STATIC_LAYER_TYPE_MAPPING", {})
        if kind not in mapping or capacity is None:
            raise EffError(
                "EFF-K205", f"layers of type `{kind}` cannot be in this cache", hint="give a capacity, or leave kv out"
            )
        layers.append(mapping[kind](max_cache_len=capacity, **given))
    return cache_class(layers)


def _tokens(
    form: CacheFormat,
    site: CacheSite,
    evict: CacheEviction | None,
    rotation: Rotation | None,
    reading: Reading | None,
) -> LayerCache:
    """Return what holds the tokens of a layer.

    Raises:
        EffError: EFF-K206 for two that each decide by themselves where a token lies.
    """
    asked = [
        *([evict.name] if evict else []),
        *([reading.spelled] if reading else []),
        *([form.name] if form.tiers else []),
    ]
    if len(asked) > 1:
        raise EffError(
            "EFF-K206",
            f"`{asked[0]}` and `{asked[1]}` cannot be combined: each decides which tokens are where",
            hint="one of them, with a format such as kivi",
        )
    if site.layout == "mla":
        if asked:
            raise EffError(
                "EFF-K206",
                f"`{asked[0]}` chooses among keys of heads, and {site.id} holds latents (MLA), one for all heads",
                site=site.id,
                hint='kv="int8-per-token" alone',
            )
        return LayerCache(form, site)
    if evict is not None:
        return EvictingCache(form, site, evict, rotation)
    if form.tiers is not None:
        return MixedCache(form, site)
    paged = reading is not None and site.layer >= reading.dense
    if site.window and not (reading is not None and paged and site.window > reading.budget):
        sliding = SlidingCache(form, site, SinkWindow(window=site.window - 1 + ROOM, sinks=0))
        if not sliding.total or sliding.most < sliding.total:
            return sliding
    if reading is not None and paged:
        return PagedCache(form, site, reading)
    return LayerCache(form, site)


@functools.cache
def classes() -> tuple[Any, Any]:
    """Return (cache class, layer class), made from transformers' own."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    class PackedLayer(CacheLayerMixin):
        """Show a `LayerCache` to transformers: what it returns for keys stands for the packed ones."""

        is_compileable = True
        is_croppable = True
        is_sliding = (
            False  # masks of sliding layers are made for all tokens; what holds a window finds its places in them
        )

        def __init__(self, tokens: LayerCache) -> None:
            super().__init__()
            self.tokens = tokens

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            """Make the tensors; transformers' `early_initialization` knows one width, which is that of the keys."""
            site = self.tokens.site
            if key_states.shape[2] == 0 and site.layout == "mla":
                value_states = value_states.new_zeros((*value_states.shape[:3], site.value_dim))
            self.tokens.prepare(key_states, value_states)
            self.batch_size = key_states.shape[0]
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
            """Append new tokens; the keys that are returned can be read by the attention `eff` only."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.tokens.append(key_states, value_states)
            return Held(self.tokens, key_states), value_states

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            """Return what a mask must cover: every place, so that its size does not change while tokens arrive."""
            return self.tokens.columns(query_length), 0

        def get_seq_length(self) -> Any:
            """Return the number of tokens: a tensor in compiled code, which must not depend on its value."""
            if not self.is_initialized:
                return 0
            return self.tokens.context if torch.compiler.is_compiling() else self.tokens.seen

        def get_max_length(self) -> int:
            """Return the capacity, -1 where the cache grows."""
            return -1 if self.tokens.longest is None else self.tokens.longest

        get_max_cache_shape = get_max_length

        def crop(self, tokens_to_remove: int) -> None:
            """Remove -n tokens; a positive number is how many stay, as in older versions of transformers."""
            self.tokens.crop(self.left(tokens_to_remove))

        def left(self, tokens_to_remove: int) -> int:
            """Return how many tokens stay."""
            held = self.tokens.seen
            return min(held, tokens_to_remove) if tokens_to_remove > 0 else held + tokens_to_remove

        def reset(self) -> None:
            """Forget all tokens."""
            self.tokens.reset()

        def reorder_cache(self, beam_idx: Tensor) -> None:
            """Reorder the sequences."""
            self.tokens.select(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            """Keep some of the sequences."""
            self._select(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            """Repeat every sequence."""
            if self.tokens.shape is not None:
                self._select(torch.arange(self.tokens.shape.batch).repeat_interleave(repeats))

        def _select(self, indices: Tensor) -> None:
            self.tokens.select(indices)
            self.batch_size = len(indices)

        def offload(self) -> None:
            """Refuse: packed tokens stay on their device."""
            raise EffError("EFF-K205", "a compressed cache cannot be offloaded", hint="offloading=False")

    class PackedCache(Cache):
        """Hold one layer for each layer of the model; passed to a prepared model as `past_key_values`."""

        def __init__(self, layers: list[Any]) -> None:
            super().__init__(layers=layers)
            self._first = next((n for n, layer in enumerate(layers) if isinstance(layer, PackedLayer)), -1)

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            """Append new tokens to a layer; what any layer cannot take in compiled code is refused before one has written."""
            if layer_idx == self._first and torch.compiler.is_compiling():
                for tokens in self.packed:
                    if (why := tokens.late(key_states.shape[2])) is not None:
                        key_states = refused(key_states, why)
                        break
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

        @property
        def packed(self) -> list[LayerCache]:
            """Return what the packed layers hold."""
            return [layer.tokens for layer in self.layers if isinstance(layer, PackedLayer)]

        @property
        def dimensions(self) -> tuple[list[int], list[int]]:
            """Return key heads and head dimension of every layer, for `early_initialization`."""
            own = [
                layer.tokens.site if isinstance(layer, PackedLayer) else self.packed[0].site for layer in self.layers
            ]
            return [int(site.kv_heads) for site in own], [site.head_dim for site in own]

        @property
        def evicted(self) -> int:
            """Return how many tokens of the context are not held any more, in the layer that holds the fewest."""
            return max((tokens.evicted for tokens in self.packed), default=0)

        def crop(self, tokens_to_remove: int) -> None:
            """Remove -n tokens from all layers, or from none where one of them refuses."""
            for layer in self.layers:
                if isinstance(layer, PackedLayer):
                    layer.tokens.check_cut(layer.left(tokens_to_remove))
            super().crop(tokens_to_remove)

        def __repr__(self) -> str:
            """Return formats, tokens and bytes in a line."""
            if not self.packed:
                return "PackedCache()"
            told = " | ".join(dict.fromkeys(tokens.spelled for tokens in self.packed))
            seen, size = max(tokens.seen for tokens in self.packed), self.nbytes() / 1e6
            windows = [tokens.site.window for tokens in self.packed if isinstance(tokens, SlidingCache)]
            slides = f"{len(windows)} with a window of {max(windows)}, " if windows else ""
            return (
                f"PackedCache({len(self.packed)} layers, {slides}{told}: {seen} tokens seen, {seen - self.evicted} held, "
                f"{self.evicted} evicted, {size:.1f} MB)"
            )

        def nbytes(self) -> int:
            """Return the bytes of all tensors of the packed layers."""
            return sum(tokens.nbytes() for tokens in self.packed)

    return PackedCache, PackedLayer
