"""Check the Triton kernels on a CUDA device against float64: every op, its twin in a compiled graph, every config.

Run with `make gpu`. The same contracts are checked on the CPU in tests/codegen/triton; here are the sizes, dtypes and binaries.
"""

import math

import pytest
import torch

pytest.importorskip("triton")

from effcompile import ops
from effcompile.codegen import triton as kernels
from effcompile.codegen.triton import block_sparse as sparse_kernel
from effcompile.codegen.triton import decode as decode_kernel
from effcompile.codegen.triton import flash as flash_kernel
from effcompile.ops import block_scores, block_sparse, column_scores, flash, int8_attention, paged_decode

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
OPAQUE = {
    "eff::attention_blocks_v1",
    "eff::int8_blocks_v1",
    "eff::kv_attention_token8_v1",
    "eff::kv_attention_grouped_v1",
}
"""Ops without a twin for compiled graphs."""
SHORT = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def registered():
    ops.register()


def draw(shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def qkv(rows=777, keys=1000, width=128, value_width=None, dtype=torch.bfloat16, heads=8, kv_heads=2, batch=2):
    q, k = draw((batch, heads, rows, width), dtype), draw((batch, kv_heads, keys, width), dtype, 1)
    return q, k, draw((batch, kv_heads, keys, value_width or width), dtype, 2)


def agree(got, exact, v, largest=None):
    out, lse = got
    assert not out.isnan().any()
    assert torch.equal(lse == -math.inf, exact[1] == -math.inf)
    # Three TF32 products are a few units short of float32.
    unit = max(torch.finfo(v.dtype).eps, 1e-5)
    assert (out.double() - exact[0]).abs().max() <= 2 * unit * (largest or v.abs().max())
    there = exact[1] != -math.inf
    assert (lse.double() - exact[1])[there].abs().max() <= 3e-5 * (8 + exact[1][there].abs().max())


def doubled(*operands):
    return [x.double() for x in operands]


@pytest.mark.parametrize("dtype", [*SHORT, torch.float32])
@pytest.mark.parametrize("width", [40, 64, 72, 80, 96, 128, 192, 256])
def test_flash_in_every_head_dimension(width, dtype):
    q, k, v = qkv(width=width, value_width=128 if width == 192 else width, dtype=dtype)
    args = (None, None, -1, 0, 223, width**-0.5, 0.0)
    agree(torch.ops.eff.flash_v1(q, k, v, *args), flash.flash(*doubled(q, k, v), *args), v)


@pytest.mark.parametrize("left", [-1, 200])
@pytest.mark.parametrize("right", [-1, 0, 30])
@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_flash_under_every_mask(left, right, ranged, softcap):
    q, k, v = qkv()
    edges = (
        [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([3, 500], [990, 500])] if ranged else [None, None]
    )
    args = (*edges, left, right, 223, 0.09, softcap)
    agree(torch.ops.eff.flash_v1(q, k, v, *args), flash.flash(*doubled(q, k, v), *args), v)


@pytest.mark.parametrize("rows", [1, 5, 32, 129])
def test_flash_with_few_queries(rows):
    q, k, v = qkv(rows=rows)
    args = (None, None, -1, 0, 1000 - rows, 0.09, 0.0)
    agree(torch.ops.eff.flash_v1(q, k, v, *args), flash.flash(*doubled(q, k, v), *args), v)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_every_config_of_flash(width):
    q, k, v = qkv(width=width)
    args = (None, None, -1, 0, 223, width**-0.5, 0.0)
    exact = flash.flash(*doubled(q, k, v), *args)
    arch = flash_kernel.launch.architecture_of(q)
    for config in flash_kernel.configs(flash_kernel.form("bf16", arch, width, width, right=True), arch):
        agree(flash_kernel.attend(q, k, v, *args, config=config), exact, v)


def test_layouts_of_packed_projections():
    packed = draw((2, 300, 3, 8, 96))
    q, k, v = (packed[:, :, part].transpose(1, 2) for part in range(3))
    args = (None, None, -1, 0, 0, 0.1, 0.0)
    agree(torch.ops.eff.flash_v1(q, k, v, *args), flash.flash(*doubled(q, k, v), *args), v)


def test_runs_are_bit_identical():
    q, k, v = qkv()
    args = (None, None, -1, 0, 223, 0.09, 0.0)
    first = torch.ops.eff.flash_v1(q, k, v, *args)
    assert all(torch.equal(one, two) for one, two in zip(first, torch.ops.eff.flash_v1(q, k, v, *args)))


def test_a_later_key_leaves_a_row_bit_identical():
    q, k, v = qkv(rows=1000)
    args = (None, None, -1, 0, 0, 0.09, 0.0)
    out, lse = torch.ops.eff.flash_v1(q, k, v, *args)
    k[:, :, 500:], v[:, :, 500:] = 10.0, -3.0
    again, again_lse = torch.ops.eff.flash_v1(q, k, v, *args)
    assert torch.equal(again[:, :, :500], out[:, :, :500])
    assert torch.equal(again_lse[:, :, :500], lse[:, :, :500])


def maps(rows, keys, q_block, kv_block, heads):
    shape = (1, heads, -(-rows // q_block), -(-keys // kv_block))
    generator = torch.Generator("cuda").manual_seed(3)
    partial = torch.rand(shape, device="cuda", generator=generator) < 0.3
    return partial, (torch.rand(shape, device="cuda", generator=generator) < 0.3) & ~partial


@pytest.mark.parametrize("dtype", [*SHORT, torch.float32])
@pytest.mark.parametrize(
    ("width", "blocks"), [(64, (128, 128)), (72, (64, 64)), (128, (128, 128)), (128, (64, 32)), (256, (128, 128))]
)
def test_block_sparse(width, blocks, dtype):
    q, k, v = qkv(width=width, dtype=dtype)
    partial, full = maps(777, 1000, *blocks, 8)
    lists = (*block_sparse.lists(partial), *block_sparse.lists(full))
    added = draw(q.shape, dtype, 5)
    shares = torch.rand(q.shape[:3], device="cuda")
    args = (*lists, *(None,) * 5, shares, added, -1, 0, 223, *blocks, width**-0.5, 0.0)
    wide = (*lists, *(None,) * 5, shares.double(), added.double(), -1, 0, 223, *blocks, width**-0.5, 0.0)
    exact = block_sparse.block_sparse(*doubled(q, k, v), *wide)
    agree(torch.ops.eff.block_sparse_v1(q, k, v, *args), exact, v, v.abs().max() + added.abs().max())
    arch = sparse_kernel.launch.architecture_of(q)
    word = sparse_kernel.launch.word(q)
    for config in sparse_kernel.configs(sparse_kernel.form(word, arch, width, width, blocks=blocks, even=False), arch)[
        1:
    ]:
        if not config.descriptors or sparse_kernel.launch.describable(k):
            agree(sparse_kernel.attend(q, k, v, *args, config=config), exact, v, v.abs().max() + added.abs().max())


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("listed", [False, True])
def test_paged_decode(width, listed, dtype):
    lengths = torch.tensor([900, 37, 1024], dtype=torch.int32, device="cuda")
    q = draw((3, 8, 2, width), dtype)
    place = torch.randperm(200, generator=torch.Generator().manual_seed(0)).to("cuda")[: 3 * 64].view(3, 64)
    pools = [torch.full((1, 2, 200, 16, width), math.nan, dtype=dtype, device="cuda") for _ in "kv"]
    for seed, pool in enumerate(pools):
        tokens = draw((3, 64 * 16, 2, width), dtype, seed + 1)
        for row in range(3):
            tokens[row, int(lengths[row]) :] = math.nan
            pool[0][:, place[row]] = tokens[row].unflatten(0, (64, 16)).permute(2, 0, 1, 3)
    pages = counts = None
    if listed:
        pages = torch.rand((3, 2, 64), device="cuda").argsort(-1)[..., :40].to(torch.int32)
        counts = torch.tensor([[40, 7], [1, 0], [33, 40]], dtype=torch.int32, device="cuda")
    args = (lengths, place.to(torch.int32), pages, counts, width**-0.5, 0.0)
    exact = paged_decode.paged_decode(*doubled(q, *pools), *args, 0)
    largest = pools[1].nan_to_num(0).abs().max()
    for splits in (0, 1, 7):
        agree(torch.ops.eff.paged_decode_v1(q, *pools, *args, splits), exact, q, largest)
    arch = decode_kernel.launch.architecture_of(q)
    form = decode_kernel.form("bf16", arch, width, width, table=True, pages=listed, counts=listed)
    for config in decode_kernel.configs(form, arch)[1:]:
        agree(decode_kernel.attend(q, *pools, *args, 0, config=config), exact, q, largest)


@pytest.mark.parametrize("width", [64, 72, 128])
def test_estimators(width):
    q, k, v = qkv(width=width)
    scale = width**-0.5
    edges = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([3, 500], [990, 700])]
    for args in ((None, None, -1, 0, 223), (*edges, 300, 0, 223)):
        got = torch.ops.eff.pooled_scores_v1(q, k, *args, 128, 64, scale)
        exact = block_scores.pooled_scores(*doubled(q, k), *args, 128, 64, scale)
        assert torch.equal(got == -math.inf, exact == -math.inf)
        torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-4)
        rest = (args[0], args[1], args[3], args[4], 128, 64, 16, scale)
        got = torch.ops.eff.antidiagonal_mass_v1(q, k, *rest)
        torch.testing.assert_close(
            got.double(), block_scores.antidiagonal_mass(*doubled(q, k), *rest), rtol=1e-3, atol=1e-6
        )
        lse = flash.flash(*doubled(q, k, v), *args, scale, 0.0)[1]
        got = torch.ops.eff.column_sums_v1(q, k, lse.float(), *args, scale, 0.0)
        exact = column_scores.column_sums(*doubled(q, k), lse, *args, scale, 0.0)
        torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-4)
        last = (*args[:4], 1000 - 64)
        got, logs = torch.ops.eff.probe_scores_v1(q[:, :, -64:], k, *last, scale, 0.0)
        exact, exact_logs = column_scores.probe_scores(*doubled(q[:, :, -64:], k), *last, scale, 0.0)
        torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(logs.double(), exact_logs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("width", [64, 72, 128])
def test_int8(width, dtype):
    q, k, v = qkv(width=width, dtype=dtype)
    k = (k.float() + 2).to(dtype)
    args = (None, None, -1, 0, 223, width**-0.5)
    out, lse = torch.ops.eff.int8_attention_v1(q, k, v, *args)
    alike, alike_lse = int8_attention.int8_attention(*doubled(q, k, v), *args)
    assert (out.double() - alike).abs().mean() <= (2 * torch.finfo(dtype).eps + 1e-4) * v.abs().max()
    assert (lse.double() - alike_lse).abs().max() <= 3e-2
    exact, _ = flash.flash(*doubled(q, k, v), *args, 0.0)
    assert (out.double() - exact).abs().mean() <= 0.02 * exact.abs().mean()


def calls():
    q, k, v = qkv(rows=320, keys=448)
    every = block_sparse.lists(torch.ones(1, 1, 3, 4, dtype=torch.bool, device="cuda"))
    cache = [x.unflatten(2, (28, 16)) for x in (k, v)]
    lengths = torch.tensor([448, 300], dtype=torch.int32, device="cuda")
    few = q[:, :, :1].contiguous()
    band = (None, None, -1, 0, 128)
    return {
        "eff::flash_v1": (q, k, v, *band, 0.09, 0.0),
        "eff::block_sparse_v1": (q, k, v, *every, *(None,) * 9, -1, 0, 128, 128, 128, 0.09, 0.0),
        "eff::paged_decode_v1": (few, *cache, lengths, None, None, None, 0.09, 0.0, 0),
        "eff::pooled_scores_v1": (q, k, *band, 64, 64, 0.09),
        "eff::antidiagonal_mass_v1": (q, k, None, None, 0, 128, 64, 64, 8, 0.09),
        "eff::column_sums_v1": (q, k, draw((2, 8, 320), torch.float32) + 6, *band, 0.09, 0.0),
        "eff::probe_scores_v1": (q[:, :, -64:], k, None, None, -1, 0, 384, 0.09, 0.0),
        "eff::int8_attention_v1": (q, k, v, *band, 0.09),
    }


@pytest.mark.parametrize("op", sorted(set(kernels.LAUNCHES) - OPAQUE))
def test_a_twin_compiled_into_a_graph_is_the_op(op):
    args = calls()[op]
    plain = getattr(torch.ops.eff, op.split("::")[1])
    twin = getattr(torch.ops.eff, kernels.traced_name(op).split("::")[1])
    expected = plain(*args)
    compiled = torch.compile(lambda *a: twin(*a), fullgraph=True)(*args)
    for one, two in zip(torch.utils._pytree.tree_leaves(compiled), torch.utils._pytree.tree_leaves(expected)):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("op", sorted(set(kernels.LAUNCHES) - OPAQUE))
def test_an_op_can_be_captured_into_a_cuda_graph(op):
    args = calls()[op]
    plain = getattr(torch.ops.eff, op.split("::")[1])
    expected = plain(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = plain(*args)
    for x in torch.utils._pytree.tree_leaves(captured):
        x.zero_()
    graph.replay()
    for one, two in zip(torch.utils._pytree.tree_leaves(captured), torch.utils._pytree.tree_leaves(expected)):
        assert torch.equal(one, two)
