"""Compare the ops of KV caches, compiled and composed, with attention in float64 over what the cache holds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile import ops
from effcompile.core.errors import EffError
from effcompile.ops.kv import common, grouped, native, per_token
from tests.support.caches import GROUPED, STORAGES, dims_of, draw, empty, exact, exact_scores, shape_of

ops.register()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Largest error relative to the output: a rounding to the dtype; before it, float32 sums with exponentials good to 20 ulp."""


def make_mask(kind: str, batch: int, heads: int, rows: int, columns: int, seed: int) -> Tensor | None:
    """Return a mask; the first row of the first sequence sees nothing of a bool one."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return None
    if kind == "float":
        return torch.randn(batch, 1, rows, columns, generator=generator)
    kept = torch.rand(batch, heads if kind == "heads" else 1, rows, columns, generator=generator) > 0.4
    kept[0, :, 0] = False
    return kept


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(STORAGES)),
    st.sampled_from(DTYPES),
    st.sampled_from([(1, 1), (2, 1), (3, 3), (1, 7)]),
    st.lists(st.sampled_from([1, 1, 1, 2, 7, 16, 17, 33, 90, 200]), min_size=1, max_size=9),
    st.sampled_from(["none", "bool", "heads", "float"]),
    st.sampled_from([0.0, 3.0]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_attention_is_that_over_what_was_appended(
    name: str,
    dtype: torch.dtype,
    heads: tuple[int, int],
    steps: list[int],
    kind: str,
    softcap: float,
    compiled: bool,
    scored: bool,
    seed: int,
) -> None:
    """Every call reads its own tokens as they are, and all before them as the state holds them."""
    storage = STORAGES[name]
    dims = dims_of(name)
    kv_heads, group = heads
    shape = shape_of(storage, sum(steps), 2, kv_heads, dims, dtype)
    state = empty(storage, shape)
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(native, "takes", lambda *tensors: False)
        for number, count in enumerate(steps):
            k, v = (draw(2, kv_heads, count, d, dtype=dtype, seed=seed + number) for d in dims)
            q = draw(2, kv_heads * group, count, dims[0], dtype=dtype, seed=seed + 50 + number)
            storage.append(state, k, v)
            length = int(state["length"])
            mask = make_mask(kind, 2, kv_heads * group, count, shape.capacity, seed + number)
            out, lse, scores = storage.attend(state, q, k, v, mask, mask is None, 0.1, softcap, 0, "", scored)
            old = storage.read(state, 0, length - count, torch.float32)
            keys, values = (torch.cat([a[..., :d], b.float()], 2) for a, b, d in zip(old, (k, v), dims))
            wanted, norm = exact(q, keys, values, mask, mask is None, 0.1, softcap)
            limit = ROUNDING[dtype] * (1 + float(wanted.abs().max()))
            assert out.dtype == dtype
            assert float((out.double() - wanted).abs().max()) <= limit
            assert torch.equal(lse == -math.inf, norm == -math.inf)
            limit = 1e-5 * (1 + float(norm.nan_to_num(neginf=0.0).abs().max()))
            assert float((lse.double() - norm).nan_to_num().abs().max()) <= limit
            assert (scores is not None) == scored
            if scores is not None:  # new tokens stand behind all places
                assert scores.shape == (*q.shape[:3], shape.capacity + count)
                found = torch.cat([scores[..., : length - count], scores[..., -count:]], -1)
                assert bool((scores[..., length - count : -count] == -math.inf).all())
                products = exact_scores(q, keys, mask, mask is None, 0.1, softcap)
                assert torch.equal(found == -math.inf, products == -math.inf)
                assert float((found - products).nan_to_num().abs().max()) <= 1e-5 * (
                    1 + float(products.nan_to_num(neginf=0.0).abs().max())
                )


@pytest.mark.parametrize("name", sorted(STORAGES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_and_composed_write_the_same_bits(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = STORAGES[name]
    shape = shape_of(storage, 420, 2, 2, (64, 64), dtype)
    first, second = empty(storage, shape), empty(storage, shape)
    for number, count in enumerate((5, 1, 130, 1, 200, 40)):
        k, v = (draw(2, 2, count, 64, dtype=dtype, seed=2 * number + odd) for odd in (0, 1))
        storage.append(first, k, v)
        with monkeypatch.context() as patch:
            patch.setattr(native, "takes", lambda *tensors: False)
            storage.append(second, k, v)
    for part in first:
        assert torch.equal(first[part], second[part]), part


@pytest.mark.parametrize("name", sorted(STORAGES))
def test_no_element_is_off_by_more_than_half_a_scale(name: str) -> None:
    """Of keys with channels a thousand times larger than others, and of tokens that are tiny, constant or zero."""
    storage = STORAGES[name]
    shape = shape_of(storage, 384, 1, 2, (64, 64), torch.float32)
    state = empty(storage, shape)
    k, v = (draw(1, 2, 320, 64, dtype=torch.float32, seed=seed).contiguous() for seed in (1, 2))
    k[..., 7] *= 1000
    v[:, :, 40:50] *= 1e-7
    v[:, :, 50] = 3.14159
    v[:, :, 51] = 0
    k[:, :, 64:128, 3] = -2.71828
    if name.startswith("rows"):  # their scales are not made for these
        k[..., 7] /= 1000
    storage.append(state, k, v)
    keys, values = storage.read(state, 0, 320, torch.float32)
    scales = {part: state[part].float() for part in ("k_scales", "v_scales") if part in state}
    if name == "fp8":
        halves = [(k.abs() / 16).maximum(scales["k_scales"][:, :, :320, None] / 1024)]
        halves.append((v.abs() / 16).maximum(scales["v_scales"][:, :, :320, None] / 1024))
    elif name == "plain":
        halves = [torch.zeros(()), torch.zeros(())]
    elif name.startswith("rows"):
        halves = [scales["k_scales"][:, None] / 2, scales["v_scales"][:, None] / 2]
    elif name in ("int8", "planes"):
        halves = [scales["k_scales"][:, :, :320, None] / 2, scales["v_scales"][:, :, :320, None] / 2]
    else:
        packed, group = int(state["packed"]), storage.group  # type: ignore[attr-defined]
        assert packed > 0
        halves = [scales["k_scales"].repeat_interleave(group, 2)[:, :, :320] / 2]
        halves.append(scales["v_scales"].transpose(2, 3).repeat_interleave(group, 3)[:, :, :320] / 2)
        assert torch.equal(keys[:, :, packed:], k[:, :, packed:])
        assert torch.equal(values[:, :, packed:], v[:, :, packed:])
    for found, given_, half in zip((keys, values), (k, v), halves):
        # Half a scale, and the float32 rounding of code * scale + zero.
        slack = 2e-7 * given_.abs()
        assert bool(((found - given_).abs() <= half + slack).all())


@pytest.mark.parametrize("name", sorted(STORAGES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_come_one_after_the_other_are_read_as_those_that_come_at_once(
    name: str, dtype: torch.dtype
) -> None:
    """Append then read equals compute anew: a token's bits depend on it and its group, never on the calls that brought it."""
    storage = STORAGES[name]
    k, v = (draw(2, 2, 300, 64, dtype=dtype, seed=seed) for seed in (1, 2))
    once, parts = (empty(storage, shape_of(storage, 320, 2, 2, (64, 64), dtype)) for _ in range(2))
    storage.append(once, k, v)
    start = 0
    for count in (1, 70, 1, 1, 128, 32, 1, 66):
        storage.append(parts, k[:, :, start : start + count], v[:, :, start : start + count])
        start += count
    assert start == 300
    if name in GROUPED:  # how many tokens wait unpacked is the calls' own; what both have packed is the same
        start = min(int(state["packed"]) for state in (once, parts))
        assert start >= 128
    found, wanted = (storage.read(state, 0, start, torch.float32) for state in (parts, once))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("name", GROUPED)
def test_a_context_within_the_residual_is_exact(name: str) -> None:
    storage = STORAGES[name]
    residual = storage.residual  # type: ignore[attr-defined]
    state = empty(storage, shape_of(storage, 2 * residual, 1, 1, (64, 64), torch.bfloat16))
    k, v = (draw(1, 1, residual, 64, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    storage.append(state, k, v)
    assert int(state["packed"]) == 0
    for found, given_ in zip(storage.read(state, 0, residual, torch.bfloat16), (k, v)):
        assert torch.equal(found, given_)
    storage.append(state, k[:, :, :1], v[:, :, :1])
    assert int(state["packed"]) == storage.group  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(STORAGES))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("compiled", [True, False])
def test_what_is_no_number_stays_none(name: str, bad: float, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query that sees the token gets NaN, as it would from the model's own values; one that does not is untouched."""
    if not compiled:
        monkeypatch.setattr(native, "takes", lambda *tensors: False)
    storage = STORAGES[name]
    state = empty(storage, shape_of(storage, 400, 1, 1, (64, 64), torch.float32))
    k, v = (draw(1, 1, 300, 64, dtype=torch.float32, seed=seed).contiguous() for seed in (1, 2))
    k[:, :, 20, 5] = bad
    storage.append(state, k, v)
    q = draw(1, 1, 1, 64, dtype=torch.float32, seed=3)
    storage.append(state, k[:, :, :1], v[:, :, :1])
    out, *_ = storage.attend(state, q, k[:, :, :1], v[:, :, :1], None, False, 0.1, 0.0, 0, "")
    if name.startswith("rows"):  # clipped, as scales that are fixed have no way to say it
        assert bool(out.isfinite().all())
    elif name != "plain" or math.isnan(
        bad
    ):  # an infinite channel that is not packed gives a score of -inf, as in the model
        assert bool(out.isnan().any())
    mask = torch.arange(state_capacity(state)) >= 64
    out, *_ = storage.attend(state, q, k[:, :, :1], v[:, :, :1], mask[None, None, None], False, 0.1, 0.0, 0, "")
    assert bool(out.isfinite().all())


def state_capacity(state: dict[str, Tensor]) -> int:
    if "keys" in state:
        return state["keys"].shape[2]
    return state["k_codes"].shape[2] if state["v_scales"].dim() == 2 else state["v_scales"].shape[-1]


@pytest.mark.parametrize("name", sorted(STORAGES))
def test_nothing_is_written_where_there_is_no_place(name: str) -> None:
    storage = STORAGES[name]
    shape = shape_of(storage, 60, 2, 1, (64, 64), torch.float32)
    state = empty(storage, shape)
    k, v = (draw(2, 1, shape.capacity - 1, 64, dtype=torch.float32, seed=seed) for seed in (1, 2))
    storage.append(state, k, v)
    before = {part: tensor.clone() for part, tensor in state.items()}
    wrong = {
        "EFF-K201": (k[:, :, :2], v[:, :, :2]),
        "EFF-K202": (k[:1, :, :1], v[:1, :, :1]),
    }
    for code, (keys, values) in wrong.items():
        with pytest.raises(EffError) as caught:
            storage.append(state, keys, values)
        assert caught.value.code == code
        assert all(torch.equal(state[part], before[part]) for part in state)
    with pytest.raises(EffError, match="EFF-K202"):
        storage.attend(
            state, k[:, :, :1], k[:, :, :1], v[:, :, :1], torch.ones(2, 1, 1, 8).bool(), False, 1.0, 0.0, 0, ""
        )
    storage.append(state, k[:, :, :1], v[:, :, :1])
    assert int(state["length"]) == shape.capacity


@pytest.mark.parametrize("name", ["int8", "4-32-128"])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_many_queries_and_few_agree(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked prefill goes another way than decode: pieces of torch's flash attention."""
    monkeypatch.setattr(common, "_PIECE", 100)
    storage = STORAGES[name]
    shape = shape_of(storage, 400, 2, 2, (64, 64), torch.float32)
    state = empty(storage, shape)
    for count in (250, 40):
        k, v = (draw(2, 2, count, 64, dtype=torch.float32, seed=seed) for seed in (1, 2))
        storage.append(state, k, v)
    q = draw(2, 4, 40, 64, dtype=torch.float32, seed=3)
    mask = make_mask(kind, 2, 4, 40, shape.capacity, 4)
    results = []
    for few in (16, 64):
        monkeypatch.setattr(common, "FEW", few)
        results.append(storage.attend(state, q, k, v, mask, mask is None, 0.1, 0.0, 0, "")[:2])
    for first, second in zip(*results):
        assert torch.equal(first.isinf(), second.isinf())
        assert float((first - second).nan_to_num().abs().max()) < 1e-4  # of values up to 20


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    storage, threads = STORAGES["4-32-128"], torch.get_num_threads()
    state = empty(storage, shape_of(storage, 1500, 1, 2, (64, 64), torch.float32))
    k, v = (draw(1, 2, 1400, 64, dtype=torch.float32, seed=seed) for seed in (1, 2))
    storage.append(state, k, v)
    q = draw(1, 4, 1, 64, dtype=torch.float32, seed=3)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(storage.attend(state, q, k[:, :, -1:], v[:, :, -1:], None, False, 0.1, 0.0, 0, "")[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_halves_are_rounded_to_the_asked_side() -> None:
    positive = torch.tensor([0.0, 5.96e-8, 1.0, 65504.0]).half()
    assert per_token.next_up(positive).tolist()[:3] == [2**-24, 2**-23, 1 + 2**-10]
    values = torch.tensor([0.0, -0.0, 2**-24, -(2**-24), 1.0, -1.0]).half()
    assert grouped._next_down(values).tolist() == [-(2**-24), -(2**-24), 0.0, -(2**-23), 1 - 2**-11, -1 - 2**-10]


@pytest.mark.parametrize("name", [name for name in STORAGES if name not in GROUPED])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_token_may_take_the_place_of_another(name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head names its own place; the bits are those of a cache to which the tokens were appended in that order."""
    if not compiled:
        monkeypatch.setattr(native, "takes", lambda *tensors: False)
    storage = STORAGES[name]
    dims = dims_of(name)
    shape = shape_of(storage, 128, 2, 3, dims, torch.float32)
    state, other = empty(storage, shape), empty(storage, shape)
    k, v = (draw(2, 3, 100, d, dtype=torch.float32, seed=seed).contiguous() for d, seed in zip(dims, (1, 2)))
    more = [draw(2, 3, 1, d, dtype=torch.float32, seed=seed) for d, seed in zip(dims, (3, 4))]
    places = torch.tensor([[0, 99, 63], [64, 7, 50]])
    storage.append(state, k, v)
    storage.append(state, *more, places)
    assert int(state["length"]) == 100
    for old, new in zip((k, v), more):
        old.scatter_(2, places[..., None, None].expand_as(new), new)
    storage.append(other, k, v)
    assert all(torch.equal(state[part], other[part]) for part in state)
    storage.append(state, *more, torch.full((2, 3), 100))
    assert int(state["length"]) == 101
    before = {part: tensor.clone() for part, tensor in state.items()}
    for wrong, code in ((torch.full((2, 3), shape.capacity), "EFF-K201"), (places[:1], "EFF-K202")):
        with pytest.raises(EffError, match=code):
            storage.append(state, *more, wrong)
    assert all(torch.equal(state[part], before[part]) for part in state)


def test_ops_tell_torch_what_they_write() -> None:
    words = {"plain": "plain_v2", "int8": "token8_v3", "fp8": "token8_v3", "4-32-128": "grouped_v2"}
    words |= {"rows-4": "rows_v1", "planes": "planes_v1"}
    for name, word in words.items():
        storage = STORAGES[name]
        state = empty(storage, shape_of(storage, 128, 1, 1, (64, 64), torch.float32))
        k, v = (draw(1, 1, 2, 64, dtype=torch.float32, seed=seed) for seed in (1, 2))
        more = (4,) if name in GROUPED else ()
        tests = ("test_schema", "test_faketensor")
        append = getattr(torch.ops.eff, f"kv_append_{word}").default
        torch.library.opcheck(append, (*state.values(), k, v, *(more or (None,))), test_utils=tests)
        storage.append(state, k, v)
        for form in ("", "scored_"):
            read = getattr(torch.ops.eff, f"kv_attention_{form}{word.partition('_')[0]}_v1").default
            settings = (None, 2.0) if name == "planes" else more
            given_ = (k, k, v, *state.values(), None, True, 0.1, 0.0, *settings, 0, "kivi")
            torch.library.opcheck(read, given_, test_utils=tests)
