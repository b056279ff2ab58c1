"""Hold the tokens of a layer with a sliding window that its queries can still see, and a few more to take back.

Old tokens go by their age alone, so nothing waits for what a query reads and nothing is packed twice: a token takes the place of
the oldest one, and where tokens lie in groups, a group that the window has left is dropped. What is dropped no query can see, so
that attention is what it is over all tokens; a mask that says otherwise is an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.core.cache import CacheFormat
from effcompile.core.errors import EffError
from effcompile.core.eviction import PROMPT, CacheEviction
from effcompile.core.site import CacheSite
from effcompile.ops.kv.refuse import Why, refused_attention
from effcompile.runtime.eviction import EvictingCache
from effcompile.runtime.kv_cache import FIRST

ROOM = 32
"""Tokens that can be taken back once the window is full, such as those that a draft model proposed."""


class SlidingCache(EvictingCache):
    """Hold the last tokens of a layer, as many as `policy` says: at least `site.window` - 1, which a new query sees beside itself.

    All heads and sequences hold the same tokens. Of a state, `positions` is -1 where a token was taken back.

    Raises:
        EffError: what the format refuses about the site.
    """

    def __init__(self, format: CacheFormat, site: CacheSite, policy: CacheEviction) -> None:
        super().__init__(format, site, policy)
        assert policy.steps
        assert not policy.first()
        assert policy.stays(0) >= site.window - 1 >= 0
        self.spelled = format.spelled

    @property
    def most(self) -> int:
        """Return the places that serve a context of any length: those that stay, and the groups and unpacked tokens of a form."""
        budget, unit = self.policy.stays(0), self.storage.unit
        return self.storage.capacity(budget if unit == 1 else max(budget, self.storage.slack) + 2 * unit)

    @property
    def evicted(self) -> int:
        """Return 0: what the window has left is not missed."""
        return 0

    # --- tensors -----------------------------------------------------------------------------------------------------------------

    def _planned(self, count: int) -> int:
        if self.total or torch.compiler.is_compiling():
            return self.most
        return min(self.most, self.storage.capacity(max(FIRST, count)))

    def _make_room(self, tokens: int) -> None:
        assert self.shape is not None
        if tokens > self.shape.capacity and not torch.compiler.is_compiling():
            self._grow(min(max(tokens, 2 * self.shape.capacity), self.most))

    # --- a call ------------------------------------------------------------------------------------------------------------------

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Return (output, LSE) of attention over all held tokens and those of the call, and store those.

        Column j of `mask` is token j of the context.

        Raises:
            EffError: EFF-K202 for a mask that shows tokens which the window has left; EFF-K206, when it runs, for a compiled call
                of many tokens on a cache that holds some.
        """
        fresh, compiled = k.shape[2], torch.compiler.is_compiling()
        if compiled and (why := self.late(fresh)) is not None:
            return refused_attention(q, v, why)
        empty = self._untouched if compiled else self.seen == 0
        self._untouched = False
        if empty:
            own = None if mask is None else mask[..., :fresh]
            out, lse, _ = self._attend(q, k, v, own, causal, scale, softcap, False)
            self._begin(k, v)
            return out, lse
        out, lse, _ = self._attend(q, k, v, self._own_mask(mask, fresh), causal, scale, softcap, False)
        self._store(k, v)
        return out, lse

    def late(self, fresh: int) -> Why | None:
        """Return why compiled code cannot take `fresh` tokens at once now: every one is stored by itself behind others."""
        if self.shape is None or self._untouched or fresh < PROMPT:
            return None
        text = "compiled code cannot store a prompt in a sliding window that holds tokens"
        return "EFF-K206", text, f"read a prompt by the model itself, or fewer than {PROMPT} tokens at a time"

    def _own_mask(self, mask: Tensor | None, fresh: int) -> Tensor | None:
        """Return the mask over places and new tokens; None where every token of the context is held in its order, and seen."""
        state = self.state
        if mask is not None:
            found: Tensor = torch.ops.eff.kv_window_mask_v1.default(
                mask, state["positions"], state["length"], state["seen"], fresh, self.total
            )
            return found
        if torch.compiler.is_compiling() or self.seen != self.length or not self._in_order():
            raise EffError(
                "EFF-K202",
                f"no mask for {self.site.id}, whose window has left tokens behind",
                hint="the model passes the mask of its sliding layers, or one of your own",
            )
        return None

    def _begin(self, k: Tensor, v: Tensor) -> None:
        """Store the last of the new tokens in place of all that is held."""
        state, fresh = self.state, k.shape[2]
        count = min(fresh, self.policy.stays(0))
        self._make_room(count)
        state = self.state
        for name in self.storage.counters:
            state[name].zero_()
        self.storage.append(state, k[:, :, fresh - count :], v[:, :, fresh - count :])
        own = torch.arange(fresh - count, fresh, device=k.device) + state["seen"]
        state["positions"][:, :, :count] = own.to(torch.int32)
        state["seen"].add_(fresh)

    def _store(self, k: Tensor, v: Tensor) -> None:
        """Store new tokens, for which the oldest go."""
        state, fresh, unit, compiled = self.state, k.shape[2], self.storage.unit, torch.compiler.is_compiling()
        if not compiled and fresh >= self.policy.stays(0):
            self._begin(k, v)
            return
        if unit == 1 and fresh > 1 and not compiled:
            self._store_runs(k, v)
            return
        for start in range(0, fresh, unit):
            part = [x[:, :, start : start + unit] for x in (k, v)]
            count = part[0].shape[2]
            if not compiled:
                self._make_room(self.length + count)
                state = self.state
            account = (state["positions"], state["mass"], state["seen"], state["length"])
            if unit == 1:
                kept = (state["budget"], state["start"], None, 0, 0.0, self.total)
                self.storage.append(state, part[0], part[1], torch.ops.eff.kv_place_v1.default(*account, *kept))
                state["seen"].add_(1)
                continue
            torch.ops.eff.kv_track_v1.default(*account, None, count, self.total)
            self.storage.append(state, part[0], part[1])
            state["seen"].add_(count)
            self.storage.drop(state, 0, 0.0)

    def _store_runs(self, k: Tensor, v: Tensor) -> None:
        """Store a few tokens at places that are free, then at those of the oldest: a write for each run of neighbors."""
        fresh, budget = k.shape[2], self.policy.stays(0)
        self._make_room(min(self.length + fresh, budget))
        state, held = self.state, self.length
        own = torch.full((budget,), -1, dtype=torch.int64)
        own[:held] = state["positions"][0, 0, :held].long().cpu()
        places = own.argsort(stable=True)[:fresh]
        ends = (places.diff() != 1).nonzero().flatten().add(1).tolist()
        seen = self.seen
        for start, stop in zip([0, *ends], [*ends, fresh]):
            at = state["length"].new_tensor(int(places[start]))
            self.storage.append({**state, "length": at}, k[:, :, start:stop], v[:, :, start:stop])
            state["positions"][:, :, int(places[start]) : int(places[stop - 1]) + 1] = torch.arange(
                seen + start, seen + stop, dtype=torch.int32, device=k.device
            )
        state["length"].fill_(max(held, int(places.max()) + 1))
        state["seen"].fill_(seen + fresh)

    # --- the past ----------------------------------------------------------------------------------------------------------------

    def _held(self) -> Tensor:
        """Return which tokens the places hold, int64 `[length]`, -1 for none."""
        return self.state["positions"][0, 0, : self.length].long().cpu()

    def _in_order(self) -> bool:
        return bool((self._held().diff() > 0).all())

    def read(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Return held tokens as floats in the model's dtype, in the order of the context; `start` and `stop` count those."""
        keys, values = super().read()
        own = self._held()
        order = own.argsort(stable=True)[int((own < 0).sum()) :][start:stop].to(keys.device)
        return keys[:, :, order], values[:, :, order]

    def check_cut(self, length: int) -> None:
        """Raise EFF-K203 where queries behind the cut would see tokens that are not held any more."""
        super(EvictingCache, self).check_cut(length)
        if not 0 < length < self.seen:
            return
        first, window = self.seen - int((self._held() >= 0).sum()), self.site.window
        if first > max(0, length - window + 1):
            raise EffError(
                "EFF-K203",
                f"the cache cannot be cut from {self.seen} to {length} tokens: {self.site.id} has a window of {window} and holds "
                f"those from token {first} on",
                hint=f"cut no more than the last {ROOM} tokens; or reset() and read the prompt again",
            )

    def crop(self, length: int) -> None:
        """Forget the tokens of the context from `length` on.

        Raises:
            EffError: EFF-K203 where the context has fewer, or where the window of what stays has left the cache.
        """
        self.check_cut(length)
        state, own = self.state, self._held() if self.state else torch.zeros(0)
        if length == self.seen:
            return
        if length == 0:
            self.reset()
            return
        if self._in_order():
            self.storage.rewind(state, int((own < length).sum()))
        else:
            places = state["positions"][:, :, : len(own)]
            places.masked_fill_(places >= length, -1)
            self.storage.rewind(state, len(own))
        state["seen"].fill_(length)
