"""Check the kernels of experts in the interpreter: blocks of rows, both products with every gate and layout, 8 bits, the sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effcompile import ops
from effcompile.codegen.triton import moe as kernel
from effcompile.codegen.triton import moe_align
from effcompile.codegen.triton.moe_parts import Weight
from effcompile.core.errors import EffError
from effcompile.core.experts import Gate
from effcompile.ops import moe_quantized
from tests.support import experts as support
from tests.support.experts import Experts, make

ops.register()
OSS = Gate("silu", "interleaved", alpha=1.702, beta=1.0, limit=1.0)
BOUND = 1e-5


def ids_of(name: str, tokens: int, top_k: int, experts: int) -> Tensor:
    draw = torch.Generator().manual_seed(tokens + top_k)
    found = torch.randint(0, experts, (tokens, top_k), generator=draw)
    if name == "one":
        found[:] = experts - 1
    if name == "sentinels":
        found = torch.randint(-2, experts + 3, (tokens, top_k), generator=draw)
        found[0] = 2**40
    return found.int() if name == "int32" else found


@pytest.mark.parametrize("few", [0, moe_align.FEW], ids=["many", "few"])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("name", ["even", "one", "sentinels", "int32"])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (20, 2, 5), (7, 18, 40)])
def test_blocks_hold_every_slot_once_in_order(
    tokens: int, top_k: int, experts: int, name: str, block: int, few: int
) -> None:
    ids = ids_of(name, tokens, top_k, experts)
    slots = ids.numel()
    rows = moe_align.align(ids, experts, block, few=few)
    total = int(rows.total)
    flat = ids.reshape(-1)
    counts = [int((flat == expert).sum()) for expert in range(experts)]
    assert total == sum(-(-count // block) * block for count in counts)
    assert total <= moe_align.capacity(slots, experts, block) == rows.blocks * block
    order = rows.order[:total].reshape(-1, block).tolist()
    owner = rows.owner[: total // block].tolist()
    assert owner == sorted(owner)
    found = [(expert, slot) for expert, block_of in zip(owner, order) for slot in block_of if slot != slots]
    assert found == [(expert, slot) for expert in range(experts) for slot in range(slots) if int(flat[slot]) == expert]
    # What fills up a block stands behind the slots in it, so that every block has one.
    assert all(line[0] != slots and line == sorted(line) for line in order)


def test_many_chunks_agree_with_one_program() -> None:
    ids = ids_of("sentinels", 61, 2, 9)
    one, many = (moe_align.align(ids, 9, 16, few=few) for few in (128, 0))
    assert moe_align.align(ids_of("even", 65, 2, 9), 9, 16).blocks == moe_align.capacity(130, 9, 16) // 16
    total = int(one.total)
    assert int(many.total) == total
    assert torch.equal(one.order[:total], many.order[:total])
    assert torch.equal(one.owner[: total // 16], many.owner[: total // 16])


def check(given: Experts, bound: float = BOUND, block: int = 0) -> Tensor:
    found = kernel.experts(*given.args, block=block)
    assert found.dtype == given.x.dtype
    assert support.error(found, support.oracle(given)) < bound
    return found


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("layout", ["concat", "interleaved", "none"])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"])
def test_every_gate_in_every_layout(act: str, layout: str, transposed: bool) -> None:
    """No size is a multiple of a tile."""
    check(make(9, 20, 24, 5, 2, Gate(act, layout), transposed=transposed))


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("layout", ["concat", "interleaved"])
def test_the_gate_of_gpt_oss_with_biases(layout: str, side: str) -> None:
    gate = Gate("silu", layout, alpha=1.702, beta=1.0, limit=1.0)
    check(make(11, 16, 16, 4, 3, gate, bias=True, transposed=True, side=side))


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 1), (1, 4, 4), (5, 1, 1), (70, 3, 2)])
def test_one_token_one_expert_and_all_experts(tokens: int, experts: int, top_k: int) -> None:
    """With 70 tokens the slots are counted in chunks."""
    check(make(tokens, 16, 16, experts, top_k))


def test_no_token_and_no_expert_for_any() -> None:
    given = make(0)
    assert kernel.experts(*given.args).shape == (0, 16)
    given = make(6)
    given.ids[:] = -1
    assert torch.equal(kernel.experts(*given.args), torch.zeros_like(given.x))


def test_all_tokens_to_one_expert_and_twice_the_same() -> None:
    given = make(40, 16, 16, 4, 2)
    given.ids[:] = 2
    check(given, block=32)


@pytest.mark.parametrize("side", ["in", "out"])
def test_what_no_expert_gets_is_never_multiplied(side: str) -> None:
    """Tokens, weights of tokens and weights of experts that no slot names are NaN."""
    given = make(9, 16, 24, 5, 2, bias=True, side=side)
    given.ids[3] = torch.tensor([-1, 5])
    given.ids[5, 1] = 7
    given.ids[given.ids == 4] = 5
    wanted = support.oracle(given)
    given.x[3] = torch.nan
    given.weights[3] = torch.nan
    given.weights[5, 1] = torch.nan
    for weight in (given.w1, given.b1, given.w2, given.b2):
        assert weight is not None
        weight[4] = torch.nan
    found = kernel.experts(*given.args)
    assert torch.equal(found[3], torch.zeros_like(found[3]))
    assert support.error(found, wanted) < BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_numbers_are_no_further_off_than_torch(dtype: torch.dtype) -> None:
    given = make(13, 32, 32, 4, 3, OSS, bias=True).to(dtype)
    wanted = support.oracle(given)
    own = support.error(kernel.experts(*given.args), wanted)
    theirs = support.error(ops.moe.composed(given.call), wanted)
    # The interpreter cuts off where hardware rounds to bfloat16, three times on the way.
    assert own < (4 if dtype == torch.bfloat16 else 1.5) * theirs
    assert own < 2 * torch.finfo(dtype).eps


def test_rows_and_weights_that_are_views() -> None:
    """A stride between rows, weights of tokens in another dtype, experts that are a slice of a larger tensor."""
    given = make(9, 16, 24, 5, 2)
    x = torch.randn(9, 40)[:, :16].copy_(given.x)
    w1 = torch.randn(5, 48, 20)[:, :, :16].copy_(given.w1)
    w2 = given.w2.transpose(1, 2).contiguous().transpose(1, 2)
    views = Experts(x, given.ids, given.weights.double(), w1, None, w2, None)
    assert not any(t.is_contiguous() for t in (x, w1, w2))
    assert torch.equal(kernel.experts(*views.args), kernel.experts(*given.args))


def test_a_token_alone_is_that_token_among_others() -> None:
    """Rows do not see each other, nor the block that they are in: same bits in the same block, whatever is beside them.

    Alone a token has fewer rows beside it, of which the interpreter makes products of other shapes: on some processors the
    library of those adds in another order.
    """
    given = make(40, 16, 16, 4, 2)
    whole = kernel.experts(*given.args)
    for token in (0, 17):
        x = torch.full_like(given.x, torch.nan)
        x[token] = given.x[token]
        beside = Experts(x, given.ids, given.weights, given.w1, None, given.w2, None)
        assert torch.equal(kernel.experts(*beside.args)[token], whole[token])
        one = Experts(
            *(t[token : token + 1] for t in (given.x, given.ids, given.weights)), given.w1, None, given.w2, None
        )
        assert support.error(kernel.experts(*one.args), whole[token : token + 1].double()) < 1e-6


@pytest.mark.parametrize("spans", [(1, 0), (32, 128)], ids=["rows", "blocks"])
@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize(("layout", "transposed"), [("concat", False), ("interleaved", True), ("none", False)])
def test_weights_in_8_bits(layout: str, transposed: bool, codes: torch.dtype, spans: tuple[int, int]) -> None:
    """The kernel computes exactly with what codes and scales stand for."""
    given = make(9, 144, 24, 3, 2, Gate("silu", layout), bias=True, transposed=transposed)
    packed = [moe_quantized.quantize(w, transposed, codes, *spans) for w in (given.w1, given.w2)]
    meant = [moe_quantized.dequantize(*pair, transposed, *spans, torch.float32) for pair in packed]
    x, ids, weights, _, b1, _, b2, *gate = given.args
    args = (x, ids, weights, *packed[0], b1, *packed[1], b2, *spans, *gate)
    wanted = support.oracle(Experts(x, ids, weights, meant[0], b1, meant[1], b2, given.gate, transposed))
    assert support.error(kernel.quantized(*args), wanted) < BOUND
    # 1 % of the largest weight in int8, 6 % of each in floats with 3 bits: their sums are less far off than the worst of them.
    assert support.error(kernel.quantized(*args), support.oracle(given)) < (0.03 if codes == torch.int8 else 0.15)


def test_calls_that_the_kernels_do_not_take_run_the_body() -> None:
    given = make(5)
    double = given.to(torch.float64)
    assert support.error(kernel.experts(*double.args), support.oracle(double)) < 1e-12
    with pytest.raises(EffError, match="EFF-M201"):
        kernel.experts(*given.args[:3], given.w1[:, :, :8], *given.args[4:])
    packed = [moe_quantized.quantize(w, False, torch.int8, 4, 8) for w in (given.w1, given.w2)]
    x, ids, weights, _, _, _, _, *gate = given.args
    args = (x, ids, weights, *packed[0], None, *packed[1], None, 4, 8, *gate)
    assert torch.equal(kernel.quantized(*args), torch.ops.eff.moe_quantized_v1(*args))


def test_a_weight_is_read_where_it_lies() -> None:
    w = torch.randn(2, 6, 4)
    assert [Weight.of(w, transposed).columns for transposed in (False, True)] == [False, True]
    assert Weight.of(w.transpose(1, 2), True).data.data_ptr() == w.data_ptr()
    assert Weight.of(torch.randn(2, 6, 8)[:, :, ::2], False).stride == 4
