"""Hold the tokens of one attention layer in the form that a cache format says.

The tensors are made when the first tokens arrive, since only those tell batch, heads and dtype, and then stay where they are:
compiled code writes into them. A cache of fixed capacity refuses more tokens (EFF-K201); one without grows by doubling, outside
compiled code only.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from effcompile.core.cache import CacheFormat, CacheShape, Storage
from effcompile.core.errors import EffError
from effcompile.core.site import CacheSite, Refusal
from effcompile.ops.kv.refuse import Why

FIRST = 256  # tokens that a growing cache has place for at first


def storage_of(format: CacheFormat, site: CacheSite) -> Storage:
    """Return how a format stores a site.

    Raises:
        EffError: with the format's own refusal.
    """
    found = format.latents(site) if site.layout == "mla" else format.storage(site)
    if isinstance(found, Refusal):
        raise EffError(
            found.code, f"`{format.spelled}` cannot store {site.id}: {found.reason}", site=site.id, hint=found.hint
        )
    return found


class LayerCache:
    """Hold keys and values of one layer; `state` is empty until `prepare`.

    `site` says which layer it is; its capacity is what is asked for, 0 for a cache that grows.

    Raises:
        EffError: what the format refuses about the site.
    """

    def __init__(self, format: CacheFormat, site: CacheSite) -> None:
        assert isinstance(site.capacity, int)
        self.method, self.site = format, site
        self.storage = storage_of(format, site)
        self.constants = format.constants(site)
        self.spelled = format.spelled
        self.limit = self.storage.capacity(site.capacity) if site.capacity else None
        self.shape: CacheShape | None = None
        self.state: dict[str, Tensor] = {}

    @property
    def capacity(self) -> int:
        """Return how many tokens the tensors hold, or would once they are made."""
        if self.shape is not None:
            return self.shape.capacity
        return self.storage.capacity(FIRST) if self.limit is None else self.limit

    @property
    def counters(self) -> tuple[str, ...]:
        """Return the int64 `[]` tensors of the state."""
        return self.storage.counters

    @property
    def length(self) -> int:
        """Return how many tokens are held. This reads a tensor: compiled code uses `state["length"]`."""
        return int(self.state["length"]) if self.state else 0

    @property
    def seen(self) -> int:
        """Return how many tokens the context has: as many as are held, where none is dropped."""
        return self.length

    @property
    def evicted(self) -> int:
        """Return how many tokens of the context a policy has dropped."""
        return 0

    @property
    def context(self) -> Tensor:
        """Return the same as a tensor of the state."""
        return self.state["length"]

    @property
    def longest(self) -> int | None:
        """Return how many tokens a context may have, None where the cache grows."""
        return self.limit

    def columns(self, fresh: int) -> int:
        """Return how many tokens a mask for `fresh` more must cover: every place, so that it stays as it is while tokens arrive."""
        self.reserve(fresh)
        if self.shape is None and self.limit is None:
            return max(self.capacity, self.storage.capacity(fresh))
        return self.capacity

    def late(self, fresh: int) -> Why | None:
        """Return why compiled code cannot take `fresh` tokens at once now, None where it can."""
        return None

    def nbytes(self) -> int:
        """Return the bytes of all tensors, counters included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state.values())

    def prepare(self, k: Tensor, v: Tensor) -> None:
        """Make the tensors for tokens like k `[B, Hkv, S, D]`, v `[B, Hkv, S, Dv]`; S may be 0."""
        capacity = self._planned(k.shape[2])
        shape = CacheShape(k.shape[0], k.shape[1], capacity, k.shape[3], v.shape[3], k.dtype, k.device)
        if (shape.head_dim, shape.value_dim) != (self.site.head_dim, self.site.value_dim):
            site = replace(self.site, head_dim=shape.head_dim, value_dim=shape.value_dim)
            assert storage_of(self.method, site) == self.storage, "the capacity was rounded for another storage"
        self.state = self._tensors(shape)
        self.shape = shape

    def _planned(self, count: int) -> int:
        """Return the capacity for a context that begins with a call of `count` tokens."""
        if self.limit is None and not torch.compiler.is_compiling():
            return max(self.capacity, self.storage.capacity(count))
        return self.capacity

    def _tensors(self, shape: CacheShape) -> dict[str, Tensor]:
        made = {
            name: torch.zeros(extents, dtype=dtype, device=shape.device)
            for name, (extents, dtype) in self._layout(shape).items()
        }
        for name in self.counters:
            made[name] = torch.zeros((), dtype=torch.int64, device=shape.device)
        for name, tensor in self.constants.items():
            made[name].copy_(tensor)
        if not torch.compiler.is_compiling():
            for tensor in made.values():
                _keep_address(tensor)
        return made

    def _layout(self, shape: CacheShape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return self.storage.tensors(shape)

    def reserve(self, count: int) -> None:
        """Make place for `count` more tokens where the cache may grow and no compiled code holds its tensors."""
        if self.shape is None or self.limit is not None or torch.compiler.is_compiling():
            return
        needed = self.length + count
        if needed <= self.shape.capacity:
            return
        self._grow(max(needed, 2 * self.shape.capacity))

    def _grow(self, tokens: int) -> None:
        assert self.shape is not None
        shape = replace(self.shape, capacity=self.storage.capacity(tokens))
        grown = self._tensors(shape)
        for name, old in self.state.items():
            grown[name][tuple(slice(0, extent) for extent in old.shape)] = old
        self.state, self.shape = grown, shape

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens behind those that are held."""
        if self.shape is None:
            self.prepare(k, v)
        self.reserve(k.shape[2])
        self.storage.append(self.state, k, v)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Return (output, LSE) of attention over all held tokens, of which k and v are the last; see `Storage.attend`."""
        out, lse, _ = self.storage.attend(
            self.state, q, k, v, mask, causal, scale, softcap, window=self.site.window, format=self.spelled
        )
        return out, lse

    def read(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Return held tokens as floats in the model's dtype."""
        if self.shape is None:
            raise EffError("EFF-K203", "the cache is empty", hint="run the model first")
        keys, values = self.storage.read(self.state, start, self.length if stop is None else stop, self.shape.dtype)
        return keys, values[..., : self.shape.value_dim]

    def check_cut(self, length: int) -> None:
        """Raise EFF-K203 where the context cannot be cut to `length` tokens."""
        seen = self.seen
        if not 0 <= length <= seen:
            raise EffError("EFF-K203", f"the cache has seen {seen} tokens and cannot be cut to {length}")

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on.

        Raises:
            EffError: EFF-K203 where fewer are held.
        """
        self.check_cut(length)
        if length < self.length:
            self.storage.rewind(self.state, length)

    def reset(self) -> None:
        """Forget all tokens; the tensors stay, so that compiled code stays valid."""
        if self.state:
            self.storage.clear(self.state)
            for name in self.counters:
                self.state[name].zero_()

    def select(self, index: Tensor) -> None:
        """Keep the sequences that `index` `[B']` names, in its order; with as many as before the tensors stay where they are."""
        if self.shape is None:
            return
        same = len(index) == self.shape.batch
        for name, tensor in self.state.items():
            if name in self.counters or name in self.constants:
                continue
            chosen = tensor.index_select(0, index.to(tensor.device))
            if same:
                tensor.copy_(chosen)
            else:
                _keep_address(chosen)
                self.state[name] = chosen
        self.shape = replace(self.shape, batch=len(index))


def _keep_address(tensor: Tensor) -> None:
    """Tell Dynamo that the tensor stays where it is, so that CUDA graphs may write into it."""
    import torch._dynamo

    torch._dynamo.mark_static_address(tensor)
