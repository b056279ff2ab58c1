"""Hold what all forms of cache share: their ops, checks before a write, and attention over old and new tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effcompile.core.cache import State
from effcompile.core.errors import EffError
from effcompile.ops import flash
from effcompile.ops.attention import define
from effcompile.ops.sinks import flash_cpu

FEW = 16
"""Queries up to which the compiled kernel is asked: it reads every code once for each few rows of queries."""
_PIECE = 1024  # old tokens that are unpacked at a time for many queries

Attended = tuple[Tensor, Tensor, Tensor | None]
"""Output, LSE and, where they were asked for, scores as softmax gets them `[B, Hq, Q, places + S]`: of the S new tokens last."""
Read = Callable[[int, int], tuple[Tensor, Tensor]]
"""Return old tokens [start, stop) as floats."""


@dataclass(frozen=True)
class Call:
    """Hold the operands of an `eff::kv_attention_*` by name; `given` are those that its body takes, in order.

    `state` and `settings` are those of the op's `Form`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    state: Mapping[str, Tensor]
    mask: Tensor | None
    causal: bool
    scale: float
    softcap: float
    settings: Mapping[str, Any]
    given: tuple[Any, ...]

    @property
    def before(self) -> Tensor:
        """Return how many tokens were there before the call."""
        return self.state["length"] - self.k.shape[2]


@dataclass(frozen=True)
class Form:
    """Name the ops of one form of cache, `eff::kv_append_*`, `eff::kv_attention_*` and its twin that returns the scores.

    `state` are the tensors of the state in the order of the operands, of which an append writes all but `length`: compiled code
    reads that count late, and what an op has written in the meantime would be wrong. `settings` is the schema of what follows
    `softcap` in an attention, `more` of what follows v in an append; `versions` are those of both. `peaks` says that an attention
    returns, last, float32 `[B, Hkv]`: the least of the largest probabilities of the queries of each key head. `outputs_keys` says
    that the output has the channels of k, and not those of v.
    """

    word: str
    state: tuple[str, ...]
    settings: tuple[str, ...] = ()
    more: tuple[str, ...] = ("Tensor? places",)
    versions: tuple[int, int] = (1, 1)
    peaks: bool = False
    outputs_keys: bool = False

    def append(self, state: State, k: Tensor, v: Tensor, *more: object, places: Tensor | None = None) -> None:
        """Run the append, and count."""
        op = getattr(torch.ops.eff, f"kv_append_{self.word}_v{self.versions[0]}").default
        op(*[state[name] for name in self.state], k, v, *more)
        length = state["length"]
        if places is None:
            length.add_(k.shape[2])
        elif places.numel():  # a token that took the place of another adds nothing
            length.copy_(torch.maximum(length, places.max() + 1))

    def attend(
        self, state: State, asked: Sequence[object], settings: Sequence[object], site: tuple[int, str], scored: bool
    ) -> Attended:
        """Run the attention: `asked` is q, k, v, mask, causal, scale, softcap; `site` is the window and the format's spelling."""
        return self.run(state, asked, settings, site, scored)[:3]

    def run(
        self, state: State, asked: Sequence[object], settings: Sequence[object], site: tuple[int, str], scored: bool
    ) -> tuple[Any, ...]:
        """Return the same and, where there are any, the peaks."""
        word = f"scored_{self.word}" if scored else self.word
        op = getattr(torch.ops.eff, f"kv_attention_{word}_v{self.versions[1]}").default
        found = op(*asked[:3], *[state[name] for name in self.state], *asked[3:], *settings, *site)
        return tuple(found) if scored else (*found[:2], None, *found[2:])

    def call(self, given: Sequence[Any]) -> Call:
        """Return the operands of an attention, as its schema has them, by name; window and format may be left out."""
        settings = [text.split()[-1] for text in self.settings]
        names = ["q", "k", "v", *self.state, "mask", "causal", "scale", "softcap", *settings]
        of = dict(zip(names, given, strict=False))
        return Call(
            **{name: of[name] for name in ("q", "k", "v", "mask", "causal", "scale", "softcap")},
            state={name: of[name] for name in self.state},
            settings={name: of[name] for name in settings},
            given=tuple(given[: len(names)]),
        )

    def define(
        self, append: Callable[..., None], attend: Callable[..., Any], places: Callable[[Sequence[Tensor]], int]
    ) -> None:
        """Define the ops, once: `places` tells of the state's tensors how many tokens they have place for."""
        count = len(self.state)
        tensors = [f"Tensor({chr(ord('a') + n)}!) {name}" for n, name in enumerate(self.state) if name != "length"]
        tensors.insert(self.state.index("length"), "Tensor length")
        written = ", ".join([*tensors, "Tensor k", "Tensor v", *self.more])
        define(f"eff::kv_append_{self.word}_v{self.versions[0]}", f"({written}) -> ()", append, _writes)
        read = ["Tensor q", "Tensor k", "Tensor v", *(f"Tensor {name}" for name in self.state), "Tensor? mask"]
        read += ["bool causal", "float scale", "float softcap", *self.settings, "int window", "str format"]
        schema, version = ", ".join(read), self.versions[1]

        def attention(*given: Any) -> tuple[Tensor, ...]:
            out, lse, _, *more = attend(*given[:-2], scored=False)
            return (out, lse, *more)

        def scored(*given: Any) -> tuple[Tensor, ...]:
            return tuple(attend(*given[:-2], scored=True))

        def fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, ...]:
            return (*flash.fake_pair(q, k, k if self.outputs_keys else v), *last(k))

        def fake_scored(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            scores = q.new_empty((*q.shape[:3], places(rest[:count]) + k.shape[2]), dtype=torch.float32)
            return (*flash.fake_pair(q, k, k if self.outputs_keys else v), scores, *last(k))

        def last(k: Tensor) -> tuple[Tensor, ...]:
            return (k.new_empty(k.shape[:2], dtype=torch.float32),) if self.peaks else ()

        name, results = f"eff::kv_attention_{self.word}_v{version}", ", ".join(["Tensor"] * (2 + self.peaks))
        define(name, f"({schema}) -> ({results})", attention, fake)
        name = f"eff::kv_attention_scored_{self.word}_v{version}"
        define(name, f"({schema}) -> ({results}, Tensor)", scored, fake_scored)


def _writes(*tensors: object) -> None:
    return None


def check_shapes(own: tuple[int, int, int, int], k: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise EFF-K202 unless new tokens fit a state of (batch, kv heads, head dim, value dim), and dtype where it holds any."""
    batch, heads, depth, width = own
    if k.shape[:3] != v.shape[:3] or (k.shape[0], k.shape[1], k.shape[3], v.shape[3]) != (batch, heads, depth, width):
        raise EffError(
            "EFF-K202",
            f"keys {list(k.shape)} and values {list(v.shape)} for a cache of batch {batch}, {heads} key heads and dimensions "
            f"{depth}/{width}",
            hint="one cache serves one model and one batch size; make another, or call reset() and reorder_cache()",
        )
    if k.dtype != v.dtype or (dtype is not None and k.dtype != dtype):
        kinds = f"keys in {k.dtype} and values in {v.dtype}"
        raise EffError(
            "EFF-K202", f"{kinds} for a cache made for {dtype or k.dtype}", hint="make the cache for this model"
        )


def check_room(length: int, count: int, capacity: int) -> None:
    """Raise EFF-K201 where a cache of `capacity` tokens has no place for `count` more."""
    if length + count > capacity:
        raise EffError(
            "EFF-K201",
            f"the cache holds {length} of {capacity} tokens and has no place for {count} more; nothing was written",
            hint=f"make it larger: capacity={length + count} or more",
        )


def check_places(places: Tensor, k: Tensor, length: int, capacity: int) -> None:
    """Raise EFF-K202 unless one token of each head goes to a place that is held or the next one; EFF-K201 where there is none."""
    if k.shape[2] != 1 or places.shape != k.shape[:2]:
        raise EffError("EFF-K202", f"places {list(places.shape)} for keys {list(k.shape)}")
    last = int(places.max()) if places.numel() else -1
    if last >= length:
        check_room(last, 1, capacity)


def corners(places: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices of batch and head that go with places `[B, Hkv]`."""
    batch, heads = places.shape
    return torch.arange(batch, device=places.device)[:, None], torch.arange(heads, device=places.device)


def check_mask(mask: Tensor | None, q: Tensor, length: int, causal: bool, fresh: int) -> None:
    """Raise EFF-K202 where a mask does not cover the queries and the tokens, or where causal order means nothing."""
    if mask is not None:
        batch, heads, rows, columns = mask.shape if mask.dim() == 4 else (0, 0, 0, 0)
        fits = batch in (1, q.shape[0]) and heads in (1, q.shape[1]) and rows in (1, q.shape[2]) and columns >= length
        if not fits:
            wanted = f"[{q.shape[0]}, {q.shape[1]}, {q.shape[2]}, {length} or more]"
            raise EffError("EFF-K202", f"a mask {list(mask.shape)} where {wanted} is needed")
    if causal and q.shape[2] != fresh:
        raise EffError("EFF-K202", f"causal order between {q.shape[2]} queries and {fresh} new tokens")


def attention(
    q: Tensor,
    old: tuple[Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    length: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute attention over unpacked old tokens `[B, Hkv, C, D]`, of which the first length - S count, and S new ones.

    The meaning of every `eff::kv_attention_*`, on any device and without reading `length` on the host.
    """
    fresh, rows, group = k.shape[2], q.shape[2], q.shape[1] // k.shape[1]
    device, places = q.device, old[0].shape[2]
    kind = torch.promote_types(q.dtype, torch.float32)
    before = length - fresh
    keys = torch.cat([old[0].to(kind), k.to(kind)], 2)
    values = torch.cat([old[1].to(kind), v.to(kind)], 2)
    column = torch.arange(places, device=device)
    kept = torch.cat([column < before, torch.ones(fresh, dtype=torch.bool, device=device)])[None].expand(rows, -1)
    if causal:
        order = torch.ones((rows, fresh), dtype=torch.bool, device=device).tril()
        kept = torch.cat([kept[:, :places], order], 1)
    scores = flash.scores(q.to(kind), keys, scale, softcap)
    kept = kept.expand(scores.shape)
    if mask is not None:
        # A column beyond the mask's own belongs to no token, and is dropped above.
        tokens = torch.cat([column, before + torch.arange(fresh, device=device)]).clamp(max=mask.shape[3] - 1)
        seen = mask.index_select(3, tokens)
        scores, kept = (scores, kept & seen) if mask.dtype == torch.bool else (scores + seen, kept)
    # What no query reads may be any number.
    read = kept.any(2).reshape(q.shape[0], -1, group, kept.shape[3]).any(2)
    values = torch.where(read[..., None], values, 0)
    scores = scores.masked_fill(~kept, -math.inf)
    out, lse = flash.weighted(scores, values)
    return out.to(q.dtype), lse.to(flash.lse_dtype(q)), scores.float()


def spread(scores: Tensor, places: int, fresh: int) -> Tensor:
    """Return scores `[..., N + S]` with the S of the new tokens behind all places of the cache: `[..., places + S]`."""
    old = scores.shape[-1] - fresh
    empty = scores.new_full((*scores.shape[:-1], places - old), -math.inf)
    return torch.cat([scores[..., :old], empty, scores[..., old:]], -1)


def attend_many(
    q: Tensor, read: Read, k: Tensor, v: Tensor, length: int, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute the same for many queries on CPU: torch's flash attention over pieces of old tokens, merged by their LSE.

    In float32, since unpacked keys and values are no numbers of a narrower type.
    """
    before, kind = length - k.shape[2], q.dtype
    seen = None if mask is None else mask[..., before:length]
    q = q.float()
    if k.shape[2]:
        out, lse = _piece(q, k.float(), v.float(), seen, causal, scale)
    else:  # torch's kernel divides by the number of keys
        out = q.new_zeros((*q.shape[:3], v.shape[3]))
        lse = q.new_full(q.shape[:3], -math.inf)
    for start in range(0, before, _PIECE):
        stop = min(before, start + _PIECE)
        keys, values = read(start, stop)
        seen = None if mask is None else mask[..., start:stop]
        more, other = _piece(q, keys, values, seen, False, scale)
        out, lse = flash.merge((out, lse), (more, other))
    return out.to(kind), lse


def _piece(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    out, lse = flash_cpu(q, k, v, mask, causal, scale)
    if mask is not None:
        empty = ~mask.any(3) if mask.dtype == torch.bool else (mask == -math.inf).all(3)
        lse = lse.masked_fill(empty, -math.inf)
        out = out.masked_fill(empty[..., None], 0.0)
    return out, lse
