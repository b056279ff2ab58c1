"""Compare attention over a cache of latents (MLA) with attention in float64 over what the cache holds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile import ops
from effcompile.core.errors import EffError
from effcompile.ops.kv import common
from effcompile.ops.kv.latent import Latent
from tests.ops.test_kv import DTYPES, ROUNDING, make_mask
from tests.support.caches import draw, empty, exact, exact_scores, shape_of

ops.register()
STORAGES = {"plain": Latent(16), "int8": Latent(), "fp8": Latent(floats=True)}
RANK, TURNED = 48, 16


def new(count: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Return latents and rotated keys of two sequences."""
    latent, rotated = (draw(2, 1, count, n, dtype=dtype, seed=seed + place) for place, n in enumerate((RANK, TURNED)))
    return latent, rotated


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(STORAGES)),
    st.sampled_from((*DTYPES, torch.float64)),
    st.sampled_from([1, 3]),
    st.lists(st.sampled_from([1, 1, 2, 7, 16, 17, 90]), min_size=1, max_size=6),
    st.sampled_from(["none", "bool", "heads", "float"]),
    st.sampled_from([0.0, 3.0]),
    st.booleans(),
    st.integers(0, 99),
)
def test_attention_is_that_over_what_was_appended(
    name: str, dtype: torch.dtype, heads: int, steps: list[int], kind: str, softcap: float, scored: bool, seed: int
) -> None:
    """All heads read one key [latent, rotated] and one value, the latent; tokens of the same call are read as they are."""
    storage = STORAGES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "_PIECE", 32)  # so that a few tokens are several pieces
        _compare(storage, dtype, heads, steps, kind, softcap, scored, seed)


def _compare(
    storage: Latent,
    dtype: torch.dtype,
    heads: int,
    steps: list[int],
    kind: str,
    softcap: float,
    scored: bool,
    seed: int,
) -> None:
    shape = shape_of(storage, sum(steps), 2, 1, (RANK, TURNED), dtype)
    state = empty(storage, shape)
    rounding = 1e-9 if dtype == torch.float64 else ROUNDING[dtype]
    for number, count in enumerate(steps):
        k, v = new(count, dtype, seed + 2 * number)
        q = draw(2, heads, count, RANK + TURNED, dtype=dtype, seed=seed + 50 + number)
        storage.append(state, k, v)
        length = int(state["length"])
        mask = make_mask(kind, 2, heads, count, shape.capacity, seed + number)
        out, lse, scores = storage.attend(state, q, k, v, mask, mask is None, 0.1, softcap, 0, "", scored)
        old = storage.read(state, 0, length - count, torch.float64)
        latents, rotated = (torch.cat([a, b.double()], 2) for a, b in zip(old, (k, v)))
        keys = torch.cat([latents, rotated], 3)
        wanted, norm = exact(q, keys, latents, mask, mask is None, 0.1, softcap)
        assert (out.shape, out.dtype) == ((2, heads, count, RANK), dtype)
        assert float((out.double() - wanted).abs().max()) <= rounding * (1 + float(wanted.abs().max()))
        assert torch.equal(lse == -math.inf, norm == -math.inf)
        limit = 1e-5 * (1 + float(norm.nan_to_num(neginf=0.0).abs().max()))
        assert float((lse.double() - norm).nan_to_num().abs().max()) <= limit
        if scored:
            assert scores is not None
            found = torch.cat([scores[..., : length - count], scores[..., -count:]], -1)
            products = exact_scores(q, keys, mask, mask is None, 0.1, softcap)
            assert torch.equal(found == -math.inf, products == -math.inf)


@pytest.mark.parametrize("name", sorted(STORAGES))
def test_what_is_held_is_within_half_a_scale(name: str) -> None:
    storage = STORAGES[name]
    state = empty(storage, shape_of(storage, 60, 2, 1, (RANK, TURNED), torch.float32))
    k, v = new(60, torch.float32, 3)
    storage.append(state, k, v)
    for found, x, part in zip(storage.read(state, 0, 60, torch.float32), (k, v), ("latent", "rotated")):
        if name == "plain":
            assert torch.equal(found, x)
            continue
        scale = state[f"{part}_scales"].float()[..., None]
        limit = scale / 2 if name == "int8" else torch.maximum(x.abs() / 16, scale / 1024)
        assert bool(((found - x).abs() <= limit * (1 + 1e-6)).all())
        assert not torch.equal(found, x)


def test_a_cut_and_another_continuation_leave_no_trace() -> None:
    storage = STORAGES["int8"]
    first, second = (empty(storage, shape_of(storage, 40, 2, 1, (RANK, TURNED), torch.float32)) for _ in range(2))
    k, v = new(40, torch.float32, 5)
    storage.append(first, k, v)
    storage.rewind(first, 25)
    storage.append(first, k[:, :, 5:10], v[:, :, 5:10])
    for part in (slice(0, 25), slice(5, 10)):
        storage.append(second, k[:, :, part], v[:, :, part])
    held = [storage.read(state, 0, 30, torch.float32) for state in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*held))


def test_nothing_is_written_where_there_is_no_place() -> None:
    storage = STORAGES["int8"]
    state = empty(storage, shape_of(storage, 8, 2, 1, (RANK, TURNED), torch.float32))
    before = {name: x.clone() for name, x in state.items()}
    with pytest.raises(EffError, match="EFF-K201"):
        storage.append(state, *new(9, torch.float32, 0))
    with pytest.raises(EffError, match="EFF-K202"):
        storage.append(state, *reversed(new(3, torch.float32, 0)))
    assert all(torch.equal(x, before[name]) for name, x in state.items())
