"""Check the costs of ops at their limits and against counts."""

from __future__ import annotations

import math

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from effcompile.cost.symbolic import (
    AttentionKind,
    AttentionShape,
    Cost,
    attention,
    causal_block_density,
    causal_pair_density,
    elementwise,
    gemm,
    kv_decode,
    selector,
    spill,
)

KINDS: tuple[AttentionKind, ...] = ("materialized", "materialized-deferred", "two-pass", "flash")
FREE = AttentionShape()
SELF = AttentionShape(Nk=FREE.Nq, Dv=FREE.D)
SIZES = st.fixed_dictionaries(
    {
        "B": st.integers(1, 8),
        "Hkv": st.integers(1, 8),
        "Nq": st.integers(1, 4096),
        "Nk": st.integers(1, 4096),
        "D": st.sampled_from([64, 72, 128, 192]),
        "Dv": st.sampled_from([64, 128]),
    }
)


def sized(sizes: dict[str, int], group: int = 4) -> AttentionShape:
    return AttentionShape(Hq=group * sizes["Hkv"], **sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_follow_the_published_convention(kind: AttentionKind) -> None:
    s = SELF
    assert sympy.simplify(attention(s, kind).flops - 4 * s.B * s.Hq * s.Nq**2 * s.D) == 0


@pytest.mark.parametrize(
    ("kind", "passes", "spilled"), [(KINDS[0], 3, 4), (KINDS[1], 2, 2), (KINDS[2], 2, 2), (KINDS[3], 1, 0)]
)
def test_passes_and_spills_are_those_of_the_cascade(kind: AttentionKind, passes: int, spilled: int) -> None:
    cost = attention(FREE, kind, score_bytes=1)
    assert cost.passes == passes
    assert sympy.simplify(cost.spill_bytes - spilled * FREE.B * FREE.Hq * FREE.Nq * FREE.Nk) == 0


def test_a_row_that_fits_on_the_chip_does_not_spill() -> None:
    assert spill(3, 1000, 512, resident=128, on_chip=128 * 512) == 0
    assert spill(3, 1000, 513, resident=128, on_chip=128 * 512) == 4 * 1000 * 513
    cost = attention(SELF, "materialized", on_chip=128 * 512, score_bytes=1)
    put = {SELF.B: 1, SELF.Hq: 1}
    assert cost.spill_bytes.subs({**put, SELF.Nq: 512}) == 0
    assert cost.spill_bytes.subs({**put, SELF.Nq: 1024}) == 4 * 1024**2


@given(SIZES, st.sampled_from(KINDS))
def test_full_density_equals_dense(sizes: dict[str, int], kind: AttentionKind) -> None:
    shape = sized(sizes)
    assert attention(shape, kind, block_density=1, pair_density=1) == attention(shape, kind)


@given(SIZES, st.fractions(0, 1), st.fractions(0, 1))
def test_blocks_are_paid_and_pairs_are_useful(sizes: dict[str, int], one: object, other: object) -> None:
    low, high = sorted((sympy.Rational(str(one)), sympy.Rational(str(other))))
    shape = sized(sizes)
    full, part = attention(shape), attention(shape, block_density=high, pair_density=low)
    assert part.flops == full.flops * high
    assert part.exps == full.exps * high
    assert part.load_bytes == full.load_bytes * high
    assert part.bytes == full.bytes
    assert part.useful == full.flops * low <= part.flops
    # A materialized kernel gains nothing from a mask.
    dense = attention(shape, "materialized", block_density=high, pair_density=low)
    assert dense.flops == full.flops
    assert dense.useful == full.flops * low


@given(SIZES)
def test_packed_groups_load_keys_once_per_group(sizes: dict[str, int]) -> None:
    shape = sized(sizes)
    packed, single = attention(shape), attention(shape, grouping="per-head")
    expanded = attention(shape, grouping="expanded")
    dims, rows = shape.D + shape.Dv, 128
    assert packed.load_bytes == 2 * shape.B * shape.Hkv * shape.Nk * dims * math.ceil(4 * shape.Nq / rows)
    assert single.load_bytes == 2 * shape.B * shape.Hq * shape.Nk * dims * math.ceil(shape.Nq / rows)
    assert packed.load_bytes <= single.load_bytes
    assert packed.bytes == single.bytes
    assert expanded.bytes - single.bytes == 2 * 2 * shape.B * shape.Hq * shape.Nk * dims
    assert (packed.flops, packed.exps) == (single.flops, single.exps)


@given(SIZES, st.sampled_from(["B", "Hkv", "Nq", "Nk", "D", "Dv"]), st.sampled_from(KINDS))
def test_monotone_in_every_size(sizes: dict[str, int], name: str, kind: AttentionKind) -> None:
    here, more = (attention(sized(each), kind) for each in (sizes, {**sizes, name: sizes[name] + 1}))
    for term in ("flops", "bytes", "spill_bytes", "load_bytes", "exps"):
        assert getattr(more, term) >= getattr(here, term)
    assert more.flops > here.flops


@given(st.integers(1, 300), st.integers(0, 300), st.sampled_from([1, 16, 64]))
def test_causal_densities_equal_counts(queries: int, extra: int, block: int) -> None:
    keys = queries + extra
    kept = sum(keys - queries + row + 1 for row in range(queries))
    assert causal_pair_density(queries, keys) == sympy.Rational(kept, queries * keys)
    blocks = -(-queries // block)
    visited = sum(row + 1 for row in range(blocks))
    assert causal_block_density(queries, block) == sympy.Rational(visited, blocks**2)
    if queries % block == 0:
        assert causal_block_density(queries, block) >= causal_pair_density(queries, queries)


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 4096))
def test_gemm(m: int, n: int, k: int) -> None:
    cost = gemm(m, n, k)
    assert (cost.flops, cost.bytes) == (2 * m * n * k, 2 * (m * k + k * n + m * n))
    assert cost.bytes - gemm(m, n, k, weight_bytes=sympy.Rational(1, 2)).bytes == sympy.Rational(3, 2) * k * n


def test_elementwise() -> None:
    cost = elementwise(1000, reads=2, writes=1, flops=3, exps=1)
    assert (cost.flops, cost.bytes, cost.exps) == (3000, 6000, 1000)


def test_decode_bytes_are_those_of_the_cache() -> None:
    s = FREE
    cost = kv_decode(AttentionShape(Nq=1, Dv=s.D))
    assert sympy.limit(cost.bytes / (4 * s.B * s.Nk * s.Hkv * s.D), s.Nk, sympy.oo) == 1
    assert cost.subs({s.Nk: 0, s.D: 128, s.Hkv: 8, s.Hq: 32, s.B: 1}).bytes == 2 * 32 * 256


@given(st.integers(1, 64), st.integers(0, 63))
def test_page_selection_reaches_the_published_bound(page: int, steps: int) -> None:
    keys, kept = page * 2048, page * (steps + 1)
    shape = AttentionShape(B=1, Hq=1, Hkv=1, Nq=1, Nk=keys, D=128, Dv=128)
    dense, sparse = kv_decode(shape), kv_decode(shape, kept=kept, page=page, score="mean")
    q_and_out = 2 * 256
    gain = (dense.bytes - q_and_out) / (sparse.bytes - q_and_out)
    assert gain == sympy.Rational(2 * keys, keys // page + 2 * kept)
    assert kv_decode(shape, kept=keys) == dense


def test_the_published_sixteen_fold() -> None:
    shape = AttentionShape(B=1, Hq=1, Hkv=1, Nq=1, Nk=32768, D=128, Dv=128)
    gain = kv_decode(shape).bytes / kv_decode(shape, kept=64 * 16, score="mean").bytes
    assert float(gain) == pytest.approx(16, rel=0.01)
    quest = kv_decode(shape, kept=64 * 16, score="minmax").bytes - kv_decode(shape, kept=64 * 16).bytes
    assert quest == 2 * 2 * 2048 * 128


def test_selectors() -> None:
    shape = AttentionShape(B=1, Hq=32, Hkv=8, Nq=8192, Nk=8192, D=128, Dv=128)
    assert selector(shape, "pooled").flops == 2 * 64**2 * 128 * 32
    assert selector(shape, "probe").flops == 2 * 64 * 8192 * 128 * 32
    assert selector(shape, "antidiagonal").flops == 2 * 8192**2 * 128 * 32 // 16
    assert selector(shape, "antidiagonal", stride=1).flops == attention(shape).flops / 2  # the whole of q k^T


def test_costs_substitute_and_add() -> None:
    cost = attention(SELF, pair_density=sympy.Rational(1, 2))
    put = {SELF.B: 1, SELF.Hq: 8, SELF.Hkv: 2, SELF.Nq: 256, SELF.D: 64}
    number = cost.subs(put)
    assert cost.free_symbols == set(put)
    assert not number.free_symbols
    assert number.flops == 4 * 8 * 256**2 * 64
    both = number + gemm(256, 512, 512)
    assert both.flops == number.flops + 2 * 256 * 512 * 512
    assert both.useful == number.flops / 2 + 2 * 256 * 512 * 512
    assert (Cost(1, passes=3) + Cost(2)).passes == 3
    assert (Cost(1) + Cost(2)).useful == 3
