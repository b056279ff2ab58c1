"""Hold the tokens of one layer that a policy of family `evict` lets stay.

Attention over a call sees all that is held and all that the call brings; then the policy chooses, and what goes is gone: its
place is used again. `positions` says which token of the context lies at a place, so that masks mean what they meant, and
`seen` counts the whole context, so that the positions of new tokens go on. Keys keep the rotation that they have.

A prompt is read into an empty cache or by eager code, since what is chosen from depends on what is held; a compiled step brings one
token, or more that all stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from effcompile.core.cache import CacheFormat, CacheShape
from effcompile.core.errors import EffError
from effcompile.core.eviction import ALL, PROMPT, CacheEviction, Context, Rotation, Step, stay
from effcompile.core.site import CacheSite
from effcompile.ops.kv import common, evict, scores
from effcompile.ops.kv.refuse import Why, refused_attention
from effcompile.runtime.kv_cache import FIRST, LayerCache


@dataclass(frozen=True)
class Call:
    """Hold the operands of an attention: q `[B, Hq, S, D]`, new k and v, mask `[B|1, Hq|1, S, N]` over held and new tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    softcap: float


class EvictingCache(LayerCache):
    """Hold keys and values of one layer, of which `policy` drops some.

    The capacity of `site` counts the tokens of the context, 0 for one without end; the tensors have place for those that stay.

    Raises:
        EffError: what the format refuses about the site, EFF-K206 where the policy needs the model's rotation and there is none.
    """

    def __init__(
        self, format: CacheFormat, site: CacheSite, policy: CacheEviction, rotation: Rotation | None = None
    ) -> None:
        assert isinstance(site.capacity, int)
        super().__init__(format, replace(site, capacity=0))
        self.policy, self.rotation = policy, rotation
        self.total = site.capacity
        self.spelled = f"{format.spelled} evict={policy.spelled}"
        self._untouched = False

    @property
    def counters(self) -> tuple[str, ...]:
        """Return those of the storage and `seen`, `budget`, `prompt`: tokens of the context when it was last chosen from."""
        return (*self.storage.counters, "seen", "budget", "prompt")

    @property
    def seen(self) -> int:
        """Return how many tokens the context has, those that were dropped as well."""
        return int(self.state["seen"]) if self.state else 0

    @property
    def context(self) -> Tensor:
        """Return the same as a tensor of the state."""
        return self.state["seen"]

    @property
    def longest(self) -> int | None:
        """Return how many tokens a context may have, None for any."""
        return self.total or None

    @property
    def evicted(self) -> int:
        """Return how many tokens of the context are not held any more."""
        return self.seen - self.length

    def columns(self, fresh: int) -> int:
        """Return how many tokens of the context a mask must cover."""
        if self.total:
            return self.total
        if torch.compiler.is_compiling():
            raise EffError("EFF-K206", "compiled code needs to know how long a context can get", hint="give a capacity")
        return self.seen + fresh

    # --- tensors -----------------------------------------------------------------------------------------------------------------

    def _planned(self, count: int) -> int:
        many = self.policy.stays(count or self.total)
        kept = min(count, many) if count >= self.policy.waits() else count
        if self.policy.steps and many < ALL:
            places = max(many, kept) + self.storage.unit
            if self.storage.unit > 1:
                sinks = evict.grouped_sinks(self.policy.first(), self.storage.unit)
                places = max(many + sinks, self.storage.slack + sinks, kept) + 2 * self.storage.unit
            places = min(places, self.total) if self.total else places
        elif self.total:
            places = kept + self.total - count
        else:
            places = max(FIRST, kept + FIRST // 4)
        return self.storage.capacity(places)

    def _layout(self, shape: CacheShape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        lead = (shape.batch, shape.kv_heads)
        return {
            **super()._layout(shape),
            "positions": ((*lead, shape.capacity), torch.int32),
            "mass": ((*lead, shape.capacity if self.policy.sums else 0), torch.float32),
            "start": ((shape.batch,), torch.int64),
        }

    def _tensors(self, shape: CacheShape) -> dict[str, Tensor]:
        made = super()._tensors(shape)
        made["budget"].fill_(self.policy.stays(0))
        return made

    def _make_room(self, tokens: int) -> None:
        """Make place for tokens in all, where no compiled code holds the tensors."""
        assert self.shape is not None
        if tokens > self.shape.capacity and not torch.compiler.is_compiling():
            self._grow(min(max(tokens, 2 * self.shape.capacity), max(self.total, tokens) if self.total else ALL))

    def prepare(self, k: Tensor, v: Tensor) -> None:
        """Make the tensors for a context that begins with tokens like these, whose number decides how many can stay; S may be 0."""
        super().prepare(k, v)
        self._untouched = k.shape[2] > 0  # compiled code that makes the tensors knows that they hold nothing

    def reserve(self, count: int) -> None:
        """Do nothing: how much place a call takes is known when its tokens are."""

    def reset(self) -> None:
        """Forget all tokens; the tensors stay."""
        super().reset()
        if self.state:
            self.state["budget"].fill_(self.policy.stays(0))
            self.state["start"].zero_()

    # --- a call ------------------------------------------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor) -> None:
        """Take note of a call; its tokens are stored when its queries are known, by `attend`.

        Raises:
            EffError: EFF-K201 for a context that gets too long, EFF-K202 for tokens of another shape.
        """
        if self.shape is None:
            evict.check_context(0, k.shape[2], self.total)
            self.prepare(k, v)
            return
        shape = self.shape
        common.check_shapes((shape.batch, shape.kv_heads, shape.head_dim, shape.value_dim), k, v, shape.dtype)
        if not torch.compiler.is_compiling():
            evict.check_context(self.seen, k.shape[2], self.total)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Return (output, LSE) of attention over all held tokens and those of the call, and let the policy choose among them.

        Column j of `mask` is token j of the context. What compiled code cannot do is an error when it runs, EFF-K206.
        """
        fresh, compiled = k.shape[2], torch.compiler.is_compiling()
        if compiled and (why := self.late(fresh)) is not None:
            return refused_attention(q, v, why)
        empty = self._untouched if compiled else self.length == 0
        self._untouched = False
        if not empty and (fresh < self.policy.waits() or fresh == 1):
            return self._step(q, k, v, mask, causal, scale, softcap)
        if empty:
            held = None if mask is None else mask[..., :fresh]
        else:
            held = self._held_mask(mask, q, self.length + fresh)
        out, lse, _ = self._attend(q, k, v, held, causal, scale, softcap, False)
        self._choose(Call(q, k, v, held, causal, scale, softcap), empty)
        return out, lse

    def late(self, fresh: int) -> Why | None:
        """Return why compiled code cannot take `fresh` tokens at once now: it cannot choose among them and those that are held."""
        if self.shape is None or self._untouched or fresh == 1 or fresh < self.policy.waits():
            return None
        text = "compiled code cannot choose among the tokens of a prompt and those that a cache holds"
        return "EFF-K206", text, "read a prompt by the model itself, or without past_key_values; compile the steps"

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        softcap: float,
        scored: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        state = {**self.state, "length": self.state["length"] + k.shape[2]}
        return self.storage.attend(
            state, q, k, v, mask, causal, scale, softcap, window=self.site.window, format=self.spelled, scored=scored
        )

    def _held_mask(self, mask: Tensor | None, q: Tensor, columns: int) -> Tensor | None:
        """Return the mask `[B, Hq, S, columns]` of held tokens in their places, and of those of the call behind them."""
        if mask is None:
            return None
        shape, seen, fresh = self.shape, self.state["seen"], q.shape[2]
        assert shape is not None
        own = torch.arange(fresh, device=seen.device)
        empty = self.state["positions"].new_zeros((shape.batch, shape.kv_heads, fresh))
        places = torch.cat([self.state["positions"], empty], 2).long()
        coming = (seen + own).expand(shape.batch, shape.kv_heads, fresh)
        places = places.index_copy(2, self.state["length"] + own, coming)[..., :columns].clamp(max=mask.shape[3] - 1)
        if mask.shape[1] > 1:
            places = scores.by_query_head(places, q.shape[1])
        heads = places.shape[1]
        found = mask.expand(shape.batch, heads, -1, -1).gather(3, places[:, :, None].expand(-1, -1, fresh, -1))
        return scores.by_query_head(found, q.shape[1])

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """Attend, and store tokens that all stay, or one for which another goes."""
        state, policy, fresh = self.state, self.policy, k.shape[2]
        if not torch.compiler.is_compiling():
            full = policy.steps and self.storage.unit == 1 and self.length >= int(state["budget"])
            self._make_room(self.length + (0 if full else fresh))
            state = self.state
        assert self.shape is not None
        held = self._held_mask(mask, q, self.shape.capacity + fresh)
        out, lse, found = self._attend(q, k, v, held, causal, scale, softcap, policy.sums)
        gain = None
        if found is not None:
            coming = state["seen"].expand(self.shape.batch, self.shape.kv_heads, fresh)
            positions = torch.cat([state["positions"].long(), coming], 2)
            after = state["seen"] + 1 - state["prompt"]
            gain = policy.gain(Step(found, positions, state["seen"].view(1), state["start"], after, self.site.layer))
        account = (state["positions"], state["mass"], state["seen"], state["length"])
        if policy.steps and self.storage.unit == 1:
            places = torch.ops.eff.kv_place_v1.default(
                *account, state["budget"], state["start"], gain, policy.first(), policy.last(), self.total
            )
            self.storage.append(state, k, v, places)
            state["seen"].add_(fresh)
            return out, lse
        torch.ops.eff.kv_track_v1.default(*account, gain, fresh, self.total)
        self.storage.append(state, k, v)
        state["seen"].add_(fresh)
        if policy.steps:
            self.storage.drop(state, policy.first(), policy.last())
        return out, lse

    # --- a prompt ----------------------------------------------------------------------------------------------------------------

    def _choose(self, call: Call, empty: bool) -> None:
        """Store what the policy lets stay of the held tokens and those of a call."""
        state, fresh = self.state, call.k.shape[2]
        held, seen = (0, 0) if empty else (self.length, self.seen)
        total = seen + fresh
        anew = empty or fresh >= PROMPT
        budget = self.policy.stays(total) if anew else int(state["budget"])
        context = self._context(call, held, seen, budget, anew)
        count = min(held + fresh, budget)
        self._make_room(count)
        state = self.state
        if count == held + fresh:
            first, keys, values, positions, mass = held, call.k, call.v, context.positions[..., held:], context.mass
            if self.policy.sums:
                state["mass"][:, :, :held] = mass[..., :held]
        else:
            chosen = stay(self.policy.rank(context), context.real, count)
            keys, values = (
                x.gather(2, chosen[..., None].expand(-1, -1, -1, x.shape[3])) for x in (context.k, context.v)
            )
            first, positions = 0, context.positions.gather(2, chosen)
            mass = context.mass.gather(2, chosen) if self.policy.sums else context.mass
            for name in self.storage.counters:
                state[name].zero_()
        self.storage.append(state, keys, values)
        state["positions"][:, :, first:count] = positions
        if self.policy.sums:
            state["mass"][:, :, first:count] = mass[..., first - count :]
        state["seen"].fill_(total)
        state["start"].copy_(context.start)
        if anew:
            state["budget"].fill_(budget)
            state["prompt"].fill_(total)

    def _context(self, call: Call, held: int, seen: int, budget: int, anew: bool) -> Context:
        """Return all that is held or arrives, with what the policy sums of it."""
        assert self.shape is not None
        state, q, k, v, device = self.state, call.q, call.k, call.v, call.k.device
        batch, heads, fresh = k.shape[:3]
        own = torch.arange(fresh, device=device)
        positions = (own + seen).expand(batch, heads, fresh)
        if call.mask is None:
            visible = torch.ones((batch, fresh), dtype=torch.bool, device=device)
        else:  # a token that does not see itself is padding
            visible = scores.visible(call.mask[:, 0, own, own + held]).expand(batch, fresh)
        start, mass = state["start"], torch.zeros((batch, heads, held + fresh), device=device)
        if held == 0:
            start = (~visible).long().cumprod(1).sum(1)
        real = visible[:, None].expand(batch, heads, fresh)
        if held:
            old = self.storage.read(state, 0, held, self.shape.dtype)
            k, v = torch.cat([old[0], k], 2), torch.cat([old[1][..., : v.shape[3]], v], 2)
            places = state["positions"][:, :, :held].long()
            positions = torch.cat([places, positions], 2)
            real = torch.cat([places >= start[:, None, None], real], 2)
            if self.policy.sums:
                mass[:, :, :held] = state["mass"][:, :, :held]
        if self.policy.sums:
            after = torch.zeros((), dtype=torch.int64, device=device) if anew else state["seen"] + 1 - state["prompt"]
            judges = self.policy.judges(fresh)
            asking = own if judges == fresh else torch.linspace(0, fresh - 1, judges, device=device).round().long()
            for rows in asking.split(scores.rows_at_once(q, k)):
                mask = None if call.mask is None else call.mask.expand(-1, -1, fresh, -1)[:, :, rows]
                asked = scores.masked_scores(q[:, :, rows], k, mask, False, 0, call.scale, call.softcap)
                if call.causal:
                    later = torch.arange(k.shape[2], device=device) > (held + rows)[:, None]
                    asked = asked.masked_fill(later, -torch.inf)
                gain = self.policy.gain(Step(asked, positions, seen + rows, start, after, self.site.layer))
                mass = mass + gain * (fresh / judges)
        return Context(
            q,
            k,
            v,
            positions,
            real,
            start,
            call.mask,
            call.causal,
            call.scale,
            call.softcap,
            mass,
            seen + fresh,
            budget,
            self.site.layer,
            self.rotation,
        )

    # --- the past ----------------------------------------------------------------------------------------------------------------

    def _left(self, length: int) -> int:
        """Return how many held tokens are from before `length`, -1 where heads differ."""
        left = (self.state["positions"][:, :, : self.length] < length).sum(-1)
        count = int(left.min()) if left.numel() else 0
        return count if count == int(left.max()) else -1

    def check_cut(self, length: int) -> None:
        """Raise EFF-K203 where heads have dropped different numbers of the tokens that are cut, or all before them."""
        super().check_cut(length)
        count = self._left(length) if 0 < length < self.seen else 1
        if count < 1:
            raise EffError(
                "EFF-K203",
                f"the cache cannot be cut from {self.seen} to {length} tokens: "
                + ("heads have dropped different tokens of those" if count else "all before them were dropped"),
                hint="cut no more than the last tokens, which the policy keeps; or reset() and read the prompt again",
            )

    def crop(self, length: int) -> None:
        """Forget the tokens of the context from `length` on.

        Raises:
            EffError: EFF-K203 where the context has fewer, or `check_cut` says that it cannot be.
        """
        self.check_cut(length)
        if length == self.seen:
            return
        if length == 0:
            self.reset()
            return
        state, held, count = self.state, self.length, self._left(length)
        own = state["positions"][:, :, :held]
        order = (
            torch.where(own < length, own, torch.iinfo(own.dtype).max).sort(dim=-1, stable=True).indices[..., :count]
        )
        if bool((order == torch.arange(count)).all()):
            self.storage.rewind(state, count)
        else:
            assert self.shape is not None
            keys, values = self.storage.read(state, 0, held, self.shape.dtype)
            chosen = [x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3])) for x in (keys, values)]
            for name in self.storage.counters:
                state[name].zero_()
            self.storage.append(state, chosen[0], chosen[1][..., : self.shape.value_dim])
        for name in ("positions", "mass"):
            if state[name].shape[2]:
                state[name][:, :, :count] = state[name].gather(2, order)
        state["seen"].fill_(length)
        state["prompt"].clamp_(max=length)
