"""Draw random mask programs, written as a person writes them in torch: hypothesis strategies.

A drawn program is a function of sizes and data operands that returns a mask; the same function runs eagerly and traced.
Data operands (padding, document ids, lengths) are filled in later, at random: recognition never sees their values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

BATCH, HEADS = 2, 3
LONGEST = 16  # extent of the data operands, at least as long as any key length


@dataclass(frozen=True)
class Scene:
    """Hold what a mask is made from: sizes (ints or symbolic) and data."""

    rows: int
    columns: int
    padding: Tensor  # bool [B, K]
    ids: Tensor  # int64 [B, LONGEST]: documents, also positions into other tensors
    lengths: Tensor  # int64 [B]
    offset: int  # of the first query, for chunked prefill and decode

    @property
    def q(self) -> Tensor:
        """Return query positions `[Q, 1]`."""
        return torch.arange(self.rows)[:, None] + self.offset

    @property
    def k(self) -> Tensor:
        """Return key positions `[1, K]`."""
        return torch.arange(self.columns)[None, :]


Build = Callable[[Scene], Tensor]  # -> bool, broadcastable to [B, H, Q, K]


@dataclass(frozen=True)
class Named:
    """Hold one mask program and how it was put together."""

    name: str
    build: Build


def _named(name: str, build: Build) -> Named:
    return Named(name, build)


def _compare() -> st.SearchStrategy[Named]:
    shifts = st.integers(-4, 6)
    return st.one_of(
        shifts.map(lambda n: _named(f"k<=q+{n}", lambda s: s.k <= s.q + n)),
        shifts.map(lambda n: _named(f"q-k<{n}", lambda s: (s.q - s.k) < n)),
        shifts.map(lambda n: _named(f"|q-k|<={n}", lambda s: (s.q - s.k).abs() <= n)),
        shifts.map(lambda n: _named(f"k>{n}", lambda s: s.k > n)),
        shifts.map(lambda n: _named(f"k!={n}", lambda s: s.k != n)),
        st.integers(2, 5).map(lambda n: _named(f"chunk{n}", lambda s: s.q // n == s.k // n)),
        st.integers(2, 5).map(lambda n: _named(f"dilated{n}", lambda s: (s.q - s.k) % n == 0)),
        st.integers(2, 5).map(lambda n: _named(f"mods{n}", lambda s: (s.q - s.k) % n + (s.q + s.k) % 3 <= n)),
        st.integers(-3, 3).map(lambda n: _named(f"{n}q<=2k", lambda s: n * s.q <= 2 * s.k)),
        st.integers(1, 3).map(
            lambda n: _named(f"far>{n}", lambda s: torch.maximum(s.q, s.k) - torch.minimum(s.q, s.k) > n)
        ),
    )


def _ready() -> st.SearchStrategy[Named]:
    """Return whole tensors that are cut, padded, joined and indexed."""
    cuts = st.integers(-3, 3)
    return st.one_of(
        cuts.map(lambda n: _named(f"tril{n}", lambda s: torch.ones(s.rows, s.columns, dtype=torch.bool).tril(n))),
        cuts.map(lambda n: _named(f"triu{n}", lambda s: torch.triu(torch.ones(s.rows, s.columns), diagonal=n) == 0)),
        st.just(_named("tril cut", lambda s: torch.ones(64, 64, dtype=torch.bool).tril()[: s.rows, : s.columns])),
        st.just(_named("tril end", lambda s: torch.ones(s.columns, s.columns, dtype=torch.bool).tril()[-s.rows :])),
        st.integers(0, 3).map(
            lambda n: _named(
                f"pad{n}",
                lambda s: torch.nn.functional.pad(torch.ones(s.rows, s.columns - n, dtype=torch.bool).tril(), (n, 0)),
            )
        ),
        st.integers(1, 3).map(
            lambda n: _named(
                f"cat{n}",
                lambda s: torch.cat([torch.ones(s.rows, n, dtype=torch.bool), (s.k <= s.q)[:, : s.columns - n]], 1),
            )
        ),
        st.just(_named("flipped places", lambda s: s.k[0].index_select(0, s.k[0]) <= s.q)),
        st.just(_named("indexed", lambda s: (s.k <= s.q)[torch.arange(s.rows)[:, None], torch.arange(s.columns)])),
        st.just(_named("transposed", lambda s: (s.q.t() <= s.k.t() + 1).t())),
        st.just(_named("repeated", lambda s: (s.k <= 3).repeat(s.rows, 1))),
        st.just(_named("cumulated", lambda s: torch.ones(s.columns, dtype=torch.int64).cumsum(0)[None] - 1 <= s.q)),
    )


def _written() -> st.SearchStrategy[Named]:
    """Return masks that are written in place after they were made (transformers 4.x)."""

    def written(n: int, value: bool, rows: bool) -> Named:
        def build(s: Scene) -> Tensor:
            mask = (s.k <= s.q).clone()
            if rows:
                mask[n:] = value
            else:
                mask[:, :n] = value
            return mask

        return _named(f"write[{n}]={value},{rows}", build)

    def padded(n: int) -> Named:
        def build(s: Scene) -> Tensor:
            mask = torch.ones(s.rows, s.columns, dtype=torch.bool).tril(n)[None, None].repeat(BATCH, 1, 1, 1)
            mask[:, :, :, : s.columns] = mask[:, :, :, : s.columns] & s.padding[:, None, None, :]
            return mask

        return _named(f"write padding {n}", build)

    def last(value: bool) -> Named:
        def build(s: Scene) -> Tensor:
            mask = torch.ones(s.rows, s.columns, dtype=torch.bool).tril()
            mask[:, -1] = value
            mask[-2:, :1].fill_(not value)
            return mask

        return _named(f"write last {value}", build)

    def masked(n: int) -> Named:
        def build(s: Scene) -> Tensor:
            mask = (s.k <= s.q).clone()
            view = mask.unsqueeze(0)
            view.masked_fill_((s.k == n)[None], True)
            mask.logical_and_(s.k < 7)
            return mask

        return _named(f"masked_fill_ {n}", build)

    return st.one_of(
        st.builds(written, st.integers(-3, 4), st.booleans(), st.booleans()),
        st.integers(-2, 2).map(padded),
        st.booleans().map(last),
        st.integers(0, 5).map(masked),
    )


def _data() -> st.SearchStrategy[Named]:
    def documents(s: Scene) -> Tensor:
        ids = s.ids[:, : s.columns]
        return (ids[:, None, : s.rows, None] if s.rows <= s.columns else ids[:, None, :1, None]) == ids[
            :, None, None, :
        ]

    def packed(s: Scene) -> Tensor:
        starts = torch.diff(s.ids, dim=-1, prepend=s.ids[:, :1] - 1) != 0
        runs = starts.cumsum(-1)
        return runs[:, None, : s.rows, None] == runs[:, None, None, : s.columns]

    return st.sampled_from(
        [
            _named("padding", lambda s: s.padding[:, None, None, :]),
            _named("padding as int", lambda s: s.padding[:, None, None, :].long() > 0),
            _named("long padding", lambda s: s.ids[:, None, None, : s.columns] != 0),
            _named("prefix", lambda s: s.k < s.lengths[:, None, None, None]),
            _named("right edge", lambda s: (s.k < s.lengths[:, None, None, None]) | (s.q > 5)),
            _named("documents", documents),
            _named("packed", packed),
            _named("looked up", lambda s: s.padding[:, torch.arange(s.columns)][:, None, None]),
            _named("joined padding", lambda s: torch.cat([s.ids[:, :2] > 0, s.padding[:, 2:]], 1)[:, None, None]),
            _named("one head", lambda s: (torch.arange(HEADS) == 1)[None, :, None, None] | (s.k <= s.q)),
        ]
    )


def predicates() -> st.SearchStrategy[Named]:
    """Return boolean mask programs."""
    leaf = st.one_of(_compare(), _ready(), _written(), _data())

    def join(inner: st.SearchStrategy[Named]) -> st.SearchStrategy[Named]:
        return st.one_of(
            st.builds(lambda a, b: _named(f"({a.name} & {b.name})", lambda s: a.build(s) & b.build(s)), inner, inner),
            st.builds(lambda a, b: _named(f"({a.name} | {b.name})", lambda s: a.build(s) | b.build(s)), inner, inner),
            st.builds(
                lambda a, b: _named(f"({a.name} ^ {b.name})", lambda s: torch.logical_xor(a.build(s), b.build(s))),
                inner,
                inner,
            ),
            inner.map(lambda a: _named(f"~{a.name}", lambda s: ~a.build(s))),
            st.builds(
                lambda a, b: _named(
                    f"where({a.name}, {b.name})", lambda s: torch.where(a.build(s), b.build(s), s.k <= s.q)
                ),
                inner,
                inner,
            ),
            inner.map(
                lambda a: _named(f"int {a.name}", lambda s: (a.build(s).long() * 2 - 1).clamp(min=0).to(torch.bool))
            ),
        )

    return st.recursive(leaf, join, max_leaves=4)


FINITE = torch.finfo(torch.float32).min


def additive(kept: Tensor, fill: float, form: int) -> Tensor:
    """Return a float mask that adds 0 to kept keys and `fill` to others, in one of several spellings."""
    if form == 0:
        return torch.zeros(kept.shape).masked_fill(~kept, fill)
    if form == 1:
        return torch.where(kept, 0.0, fill)
    if form == 2 and fill != -float("inf"):
        return (1.0 - kept.float()) * fill
    if form == 3:
        mask = torch.full(kept.shape, fill)
        mask.masked_fill_(kept, 0.0)
        return mask
    if form == 4:  # two masks are added: where both drop a key, two finite fills become -inf
        halves = torch.arange(kept.shape[-1]) % 2 == 0
        return sum(torch.zeros(kept.shape).masked_fill(~(kept | part), fill) for part in (halves, torch.arange(1) > 0))  # type: ignore[return-value]
    return torch.full(kept.shape, fill).masked_fill(kept, 0.0)


def scene(rows: int, columns: int, seed: int, offset: int = 0) -> Scene:
    """Return a scene with data drawn from a seed: padding on either side, with holes, or everywhere."""
    draw = torch.Generator().manual_seed(seed)
    padding = torch.rand(BATCH, columns, generator=draw) < 0.7
    style = seed % 4
    if style == 1:
        padding = torch.arange(columns)[None] >= torch.randint(0, columns, (BATCH, 1), generator=draw)
    elif style == 2:
        padding = torch.arange(columns)[None] < torch.randint(0, columns + 1, (BATCH, 1), generator=draw)
    ids = torch.randint(0, 3, (BATCH, LONGEST), generator=draw).sort(-1).values
    lengths = torch.randint(0, columns + 1, (BATCH,), generator=draw)
    return Scene(rows, columns, padding, ids, lengths, offset)
