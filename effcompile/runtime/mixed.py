"""Hold the tokens of one layer in two numbers of bits, by how much queries read them.

Which tokens are worth more bits is known when queries have seen them. So attention over a call comes first; then the tokens of a
prompt are divided by what some of its queries read, and later ones by what all queries read since they came. The share that gets
more bits is each layer's own: that of the fewest tokens of the first prompt which hold enough of the attention.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from effcompile.core.cache import CacheFormat, CacheShape, Tiers
from effcompile.core.errors import EffError
from effcompile.core.site import CacheSite
from effcompile.ops.kv import common, evict, mixed, plain, scores
from effcompile.ops.kv.grouped import Grouped
from effcompile.runtime.kv_cache import FIRST, LayerCache


class MixedCache(LayerCache):
    """Hold keys and values of one layer in the tiers of a format.

    Raises:
        EffError: what the format refuses about the site.
    """

    def __init__(self, format: CacheFormat, site: CacheSite) -> None:
        super().__init__(format, replace(site, capacity=0))
        assert isinstance(site.capacity, int)
        assert format.tiers is not None
        self.tiers: Tiers = format.tiers
        self.total = site.capacity
        self.parts = [Grouped(bits, self.tiers.group, self.tiers.group) for bits in self.tiers.bits]

    @property
    def counters(self) -> tuple[str, ...]:
        """Return how many tokens both parts hold, how many of them in packed form, and the unpacked and all tokens."""
        return ("length", "seen", *(part + name for part in mixed.PARTS for name in ("length", "packed")))

    @property
    def length(self) -> int:
        """Return how many tokens are held: all that were seen."""
        return int(self.state["seen"]) if self.state else 0

    @property
    def context(self) -> Tensor:
        """Return the same as a tensor of the state."""
        return self.state["seen"]

    @property
    def longest(self) -> int | None:
        """Return how many tokens a context may have, None for any."""
        return self.total or None

    def columns(self, fresh: int) -> int:
        """Return how many tokens of the context a mask must cover."""
        if self.total:
            return self.total
        if torch.compiler.is_compiling():
            raise EffError("EFF-K206", "compiled code needs to know how long a context can get", hint="give a capacity")
        return self.seen + fresh

    # --- tensors -----------------------------------------------------------------------------------------------------------------

    def prepare(self, k: Tensor, v: Tensor) -> None:
        """Make the tensors for tokens like these; what share of them the first part holds is known after a prompt."""
        self._make(k, v, 0.5, self.total or max(FIRST, k.shape[2]))

    def _make(self, k: Tensor, v: Tensor, share: float, capacity: int) -> None:
        self.constants = {"share": torch.full((), share, dtype=torch.float64, device=k.device)}
        shape = CacheShape(k.shape[0], k.shape[1], capacity, k.shape[3], v.shape[3], k.dtype, k.device)
        self.state = self._tensors(shape)
        self.shape = shape

    def _layout(self, shape: CacheShape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        tiers, lead = self.tiers, (shape.batch, shape.kv_heads)
        share = float(self.constants["share"])
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for prefix, part, of in zip(mixed.PARTS, self.parts, (share, 1 - share)):
            # Whole groups go to a part, so it can be half a group ahead, and a group holds what the share leaves of one.
            own = replace(shape, capacity=part.capacity(int(of * shape.capacity)) + 2 * part.group)
            found |= {prefix + name: layout for name, layout in part.tensors(own).items()}
            found[f"{prefix}positions"] = ((*lead, own.capacity), torch.int32)
        room = tiers.residual + tiers.interval
        found["k_recent"] = ((*lead, room, shape.head_dim), shape.dtype)
        found["v_recent"] = ((*lead, room, shape.value_dim), shape.dtype)
        found["mass"] = ((*lead, room), torch.float32)
        return found | {"share": ((), torch.float64)}

    def reserve(self, count: int) -> None:
        """Make place for `count` more tokens where the cache may grow and no compiled code holds its tensors."""
        if self.shape is None or self.total or torch.compiler.is_compiling():
            return
        if self.seen + count > self.shape.capacity:
            self._grow(max(self.seen + count, 2 * self.shape.capacity))

    def _grow(self, tokens: int) -> None:
        assert self.shape is not None
        old, shape = self.state, replace(self.shape, capacity=tokens)
        grown = self._tensors(shape)
        for name, tensor in old.items():
            grown[name][tuple(slice(0, extent) for extent in tensor.shape)] = tensor
        self.state, self.shape = grown, shape

    # --- a call ------------------------------------------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor) -> None:
        """Take note of a call; its tokens are stored when its queries are known, by `attend`.

        Raises:
            EffError: EFF-K201 for a context that gets too long, EFF-K202 for tokens of another shape.
        """
        if self.shape is not None:
            shape = self.shape
            common.check_shapes((shape.batch, shape.kv_heads, shape.head_dim, shape.value_dim), k, v, shape.dtype)
        if not torch.compiler.is_compiling():
            evict.check_context(self.seen, k.shape[2], self.total)
        elif self.shape is None:
            raise EffError(
                "EFF-K206",
                "compiled code cannot know how many tokens of its first prompt get more bits",
                hint="read a prompt by the model itself, or without past_key_values; compile the steps",
            )

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Return (output, LSE) of attention over all held tokens and those of the call, and store those."""
        fresh, tiers = k.shape[2], self.tiers
        first = not torch.compiler.is_compiling() and self.seen == 0
        if first:
            own = None if mask is None else mask[..., :fresh]
            rank, share = self._ranked(q, k, own, causal, scale, softcap)
            if self.shape is None:
                self._make(k, v, share, self.total or max(FIRST, 2 * fresh))
            self.reserve(fresh)
            out, lse = self._of_prompt(q, k, v, own, causal, scale, softcap)
            self.state["length"].copy_(self._store(k, v, rank))
            self.state["seen"].add_(fresh)
            return out, lse
        self.reserve(fresh)
        state = self.state
        packed = [state[name] for name in mixed.PACKED]
        out, lse, gain = torch.ops.eff.kv_attention_mixed_v1.default(
            q,
            k,
            v,
            *packed,
            *(state[name] for name in mixed.RECENT),
            mask,
            causal,
            scale,
            softcap,
            *tiers.bits,
            self.site.window,
            self.spelled,
        )
        account = (state["mass"], state["length"], state["seen"], state["share"], k, v, gain)
        left = torch.ops.eff.kv_mix_v1.default(
            *packed,
            state["k_recent"],
            state["v_recent"],
            *account,
            tiers.residual,
            tiers.interval,
            *tiers.bits,
            self.total,
        )
        state["length"].copy_(left)
        state["seen"].add_(fresh)
        return out, lse

    def _of_prompt(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """Return (output, LSE) over the tokens of a first call alone: its probes have judged them, so that no score is kept."""
        state = {
            "keys": self.state["k_recent"],
            "values": self.state["v_recent"],
            "length": self.state["seen"] + k.shape[2],
        }
        asked = (q, k, v, mask, causal, scale, softcap)
        found = plain.FORM.attend(state, asked, (), (self.site.window, self.spelled), False)
        return found[0], found[1]

    def _ranked(
        self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float
    ) -> tuple[Tensor, float]:
        """Return what probes read of a prompt's tokens `[B, Hkv, S]`, per probe that sees it, and the share of tokens to favor."""
        heads, count, tiers = k.shape[1], k.shape[2], self.tiers
        spread = torch.linspace(0, max(0, count - tiers.recent - 1), min(tiers.spread, max(0, count - tiers.recent)))
        rows = torch.cat([spread.long(), torch.arange(max(0, count - tiers.recent), count)]).unique().to(k.device)
        read, saw = torch.zeros(k.shape[:3], device=k.device), torch.zeros((k.shape[0], 1, count), device=k.device)
        for row in rows.split(scores.rows_at_once(q, k)):
            seen = None if mask is None else mask.expand(-1, -1, count, -1)[:, :, row]
            asked = scores.masked_scores(q[:, :, row], k, seen, False, 0, scale, softcap)
            if causal:
                asked = asked.masked_fill(torch.arange(count, device=k.device) > row[:, None], -torch.inf)
            weights = scores.weights(asked)
            read += scores.by_key_head(weights.sum(2), heads)
            saw += (asked > -torch.inf).any(1).sum(1, dtype=torch.float32)[:, None]
        most = read.mean(1).sort(dim=-1, descending=True).values  # of a layer: the mean over its heads
        enough = most.cumsum(-1) < tiers.mass * most.sum(-1, keepdim=True)
        share = float(((enough.sum(-1) + 1) / max(1, count)).max()) if count else 0.5
        return read / saw.clamp(min=1), min(1.0, max(tiers.least, share))

    def _store(self, k: Tensor, v: Tensor, rank: Tensor) -> int:
        """Store the first tokens of a context; return how many of them are not packed."""
        state, tiers, total = self.state, self.tiers, k.shape[2]
        count = max(0, total - tiers.residual) // tiers.group * tiers.group
        parts = [[state[prefix + name] for name in (*mixed.NAMES, "positions")] for prefix in mixed.PARTS]
        if count:
            many = mixed.quota(float(state["share"]), 0, 0, count, tiers.group)
            mixed.divide(parts, k[:, :, :count], v[:, :, :count], rank[:, :, :count], many, 0, tiers.bits)
        left = total - count
        state["k_recent"][:, :, :left], state["v_recent"][:, :, :left] = k[:, :, count:], v[:, :, count:]
        state["mass"][:, :, :left] = rank[:, :, count:]
        return left

    # --- the past ----------------------------------------------------------------------------------------------------------------

    def read(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Return held tokens as floats in the model's dtype, in the order of the context."""
        if self.shape is None:
            raise EffError("EFF-K203", "the cache is empty", hint="run the model first")
        state, recent = self.state, int(self.state["length"])
        keys, values = ([state[name][:, :, :recent]] for name in ("k_recent", "v_recent"))
        places = [torch.arange(self.seen - recent, self.seen).expand(*keys[0].shape[:2], recent)]
        for prefix, part in zip(mixed.PARTS, self.parts):
            own = {name: state[prefix + name] for name in mixed.NAMES}
            held = int(own["length"])
            found = part.read(own, 0, held, self.shape.dtype)
            keys.append(found[0])
            values.append(found[1])
            places.append(state[f"{prefix}positions"][:, :, :held].long().cpu())
        order = torch.cat(places, 2).argsort(-1).to(keys[0].device)[..., None]
        k, v = (torch.cat(x, 2) for x in (keys, values))
        end = self.seen if stop is None else stop
        k, v = (x.gather(2, order.expand(-1, -1, -1, x.shape[3]))[:, :, start:end] for x in (k, v))
        return k, v

    def check_cut(self, length: int) -> None:
        """Raise EFF-K203 where fewer tokens are held, or where some of those that are cut are packed."""
        super().check_cut(length)
        held, recent = self.seen, int(self.state["length"]) if self.state else 0
        if length and held - length > recent:
            raise EffError(
                "EFF-K203",
                f"the cache cannot be cut from {held} to {length} tokens: only the last {recent} are not packed yet",
                hint="cut no more than those, or reset() and read the prompt again",
            )

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on.

        Raises:
            EffError: EFF-K203 where `check_cut` says that they cannot be.
        """
        self.check_cut(length)
        if not length:
            self.reset()
            return
        self.state["length"].sub_(self.seen - length)
        self.state["seen"].fill_(length)

    def reset(self) -> None:
        """Forget all tokens; the tensors stay, and the share with them."""
        for name in self.counters:
            if name in self.state:
                self.state[name].zero_()
