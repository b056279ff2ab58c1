"""Compare `eff::moe_v1`, its kernel and its torch body with a double loop in float64, at the shapes where they turn a corner."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effcompile import ops
from effcompile.core.errors import EffError
from effcompile.core.experts import ACTS, LAYOUTS, Gate
from effcompile.ops import moe, native, native_moe
from tests.support import experts as support

ops.register()
OSS = Gate("silu", "interleaved", alpha=1.702, beta=1.0, limit=1.0)
gates = st.builds(
    Gate,
    st.sampled_from(ACTS),
    st.sampled_from(LAYOUTS),
    st.just(1.0),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([0.0, 0.5]),
)


def bodies(given: support.Experts) -> list[torch.Tensor]:
    """Return what the op, and its body in torch operations, give."""
    found = [torch.ops.eff.moe_v1(*given.args), moe.composed(given.call)]
    if native_moe.takes(given.x):
        found.append(native_moe.run(given.call))
    return found


def test_the_dispatcher_calls_the_kernel_without_python_and_the_body_takes_the_rest() -> None:
    """What the kernel reads as it is goes to it in C++; other layouts and wrong operands go to the body in Python."""
    if native.library(native.EXPERTS) is None:
        pytest.skip("no C++ compiler")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("eff::moe_v1", "CPU")
    made = support.make(9, 16, 24, 4, 2)
    exact = support.oracle(made)
    x, ids, weights, w1, b1, w2, b2, *gate = made.args
    wide = torch.stack([w1, w1], -1)[..., 0]  # rows that are not dense
    for args in (
        (x, ids, weights, w1, b1, w2, b2),
        (x.t().contiguous().t(), ids.int(), weights.double(), wide, b1, w2, b2),
        (x, ids, weights, w1.transpose(1, 2).contiguous().transpose(1, 2), b1, w2, b2),
    ):
        assert support.error(torch.ops.eff.moe_v1(*args, *gate), exact) < 1e-5
    assert torch.ops.eff.moe_v1(x[:0], ids[:0], weights[:0], w1, b1, w2, b2, *gate).shape == (0, 16)
    with pytest.raises(EffError, match="EFF-M201"):
        torch.ops.eff.moe_v1(x, ids, weights, w1, b1, w2[:, :8], b2, *gate)
    with pytest.raises(EffError, match="EFF-M202"):
        torch.ops.eff.moe_v1(x, ids, weights, w1, b1, w2, b2, "tanh", *gate[1:])


@pytest.mark.parametrize(("tokens", "hidden", "inner", "experts", "top_k"), [(1, 32, 48, 1, 1), (40, 48, 96, 3, 2)])
def test_gates_and_their_other_halves_may_be_tensors_of_their_own(
    tokens: int, hidden: int, inner: int, experts: int, top_k: int
) -> None:
    made = support.make(tokens, hidden, inner, experts, top_k)
    made.ids[0, 0] = -1
    gate, up = (half.contiguous() for half in made.w1.chunk(2, 1))
    if not native_moe.adds(made.x, gate, up, made.w2):
        pytest.skip("no C++ compiler")
    before = torch.randn(tokens, hidden)
    out = before.clone()
    native_moe.add_swiglu(out, made.x, made.ids, made.weights, gate, up, made.w2)
    assert support.error(out, before.double() + support.oracle(made)) < 1e-5
    apart = torch.stack([gate, gate], 1)[:, 0]
    assert not native_moe.adds(made.x, apart, up, made.w2) or experts == 1, "strides differ"


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 2, 9, 17, 70, 130]),
    hidden=st.sampled_from([1, 16, 21, 64]),
    inner=st.sampled_from([1, 24, 50]),
    experts=st.sampled_from([1, 3, 7]),
    top_k=st.integers(1, 7),
    gate=gates,
    bias=st.booleans(),
    transposed=st.booleans(),
    side=st.sampled_from(["in", "out"]),
    seed=st.integers(0, 3),
)
def test_every_body_is_the_double_loop(
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    top_k: int,
    gate: Gate,
    bias: bool,
    transposed: bool,
    side: str,
    seed: int,
) -> None:
    made = support.make(tokens, hidden, inner, experts, min(top_k, experts), gate, bias, transposed, side, seed)
    exact = support.oracle(made)
    for found in bodies(made):
        assert support.error(found, exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("hidden", "inner", "experts"), [(32, 40, 4), (64, 96, 4), (90, 62, 4), (45, 33, 4), (96, 160, 1), (64, 224, 9)]
)
@pytest.mark.parametrize("gate", [Gate(), OSS], ids=["halves", "pairs"])
def test_narrow_dtypes_lose_no_more_than_eager(
    dtype: torch.dtype, transposed: bool, hidden: int, inner: int, experts: int, gate: Gate
) -> None:
    made = support.make(90, hidden, inner, experts, min(2, experts), gate, bias=True, transposed=transposed).to(dtype)
    exact = support.oracle(made)
    eager = support.error(moe.composed(made.call), exact)
    assert support.error(torch.ops.eff.moe_v1(*made.args), exact) <= max(eager, 4e-3)


def test_all_tokens_to_one_expert_and_none_to_others() -> None:
    made = support.make(200, 48, 100, 9, 1)
    made = replace(made, ids=torch.full_like(made.ids, 6))
    exact = support.oracle(made)
    assert all(support.error(found, exact) < 1e-5 for found in bodies(made))


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_ids_outside_touch_nothing(tokens: int) -> None:
    """A slot of another rank must not be multiplied by 0: what lies there may be NaN."""
    made = support.make(tokens, experts=4)
    made.ids[:, 1] = torch.where(torch.arange(tokens) % 2 == 0, 4, -1)
    made.weights[:, 1] = float("nan")
    exact = support.oracle(made)
    assert not exact.isnan().any()
    assert all(support.error(found, exact) < 1e-5 for found in bodies(made))


def test_order_of_tokens_slots_and_experts_changes_nothing() -> None:
    made = support.make(33, experts=6, top_k=3)
    plain = torch.ops.eff.moe_v1(*made.args)
    order = torch.randperm(33)
    moved = replace(made, x=made.x[order], ids=made.ids[order], weights=made.weights[order])
    torch.testing.assert_close(torch.ops.eff.moe_v1(*moved.args), plain[order])
    turned = replace(made, ids=made.ids.flip(1), weights=made.weights.flip(1))
    torch.testing.assert_close(torch.ops.eff.moe_v1(*turned.args), plain)
    named = torch.randperm(6)
    renamed = replace(made, ids=torch.argsort(named)[made.ids], w1=made.w1[named], w2=made.w2[named])
    torch.testing.assert_close(torch.ops.eff.moe_v1(*renamed.args), plain)


def test_one_expert_is_the_dense_layer() -> None:
    made = support.make(20, experts=1, top_k=1)
    made = replace(made, weights=torch.ones_like(made.weights))
    g, u = (made.x @ made.w1[0].t()).chunk(2, -1)
    torch.testing.assert_close(
        torch.ops.eff.moe_v1(*made.args), (torch.nn.functional.silu(g) * u) @ made.w2[0].t(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs several threads")
def test_threads_change_no_bit() -> None:
    made = support.make(150, 64, 96, 3, 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = torch.ops.eff.moe_v1(*made.args)
        torch.set_num_threads(3)
        assert torch.equal(torch.ops.eff.moe_v1(*made.args), one)
    finally:
        torch.set_num_threads(before)


def test_views_of_larger_weights_are_read_where_they_lie() -> None:
    made = support.make(12, experts=6)
    large = torch.cat([made.w1, made.w1], 2)
    sliced = replace(made, w1=large[:, :, : made.w1.shape[2]], w2=made.w2.transpose(1, 2).contiguous().transpose(1, 2))
    assert support.error(torch.ops.eff.moe_v1(*sliced.args), support.oracle(made)) < 1e-5


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"ids": torch.zeros(4, 9, dtype=torch.long), "weights": torch.ones(4, 9)}, "9 experts for each token of 5"),
        ({"weights": torch.ones(4, 3)}, "weights is"),
        ({"w2": torch.zeros(5, 16, 9)}, "w2 is"),
        ({"x": torch.zeros(4, 16, dtype=torch.bfloat16)}, "bfloat16"),
        ({"ids": torch.zeros(4, 2)}, "ids in"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], word: str) -> None:
    made = replace(support.make(4), **change)
    with pytest.raises(EffError, match=word) as caught:
        torch.ops.eff.moe_v1(*made.args)
    assert caught.value.code == "EFF-M201"


def test_an_unknown_gate_is_refused() -> None:
    with pytest.raises(EffError, match="EFF-M202"):
        torch.ops.eff.moe_v1(*replace(support.make(4), gate=Gate("tanh")).args)
