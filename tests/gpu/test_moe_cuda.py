"""Check the experts of a layer on a CUDA device: the kernels against float64, whole graphs against eager, and no host read.

Run with `make gpu`. The kernels are checked in Triton's interpreter in tests/codegen/triton; here are the sizes, dtypes and
binaries.
"""

import pytest
import torch

pytest.importorskip("triton")

import effcompile as eff
from effcompile import ops
from effcompile.core.experts import Gate
from effcompile.ops import moe_quantized
from tests.support import experts as support

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
OSS = Gate("silu", "interleaved", alpha=1.702, beta=1.0, limit=1.0)
CASES = {
    "even": {},
    "oss": {"gate": OSS, "bias": True, "transposed": True},
    "odd": {"hidden": 200, "inner": 72},
    "ungated": {"gate": Gate("relu2", "none")},
    "gelu": {"gate": Gate("gelu", "concat")},
    "input": {"side": "in"},
}


def device(args):
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]


def exact_of(given):
    """Return the result in float64; the op's body, which is compared with a loop over tokens on the CPU."""
    return ops.moe.composed(given.to(torch.float64).call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("name", CASES)
def test_the_op_on_the_device_is_what_float64_gives(name, tokens, dtype):
    """300 tokens are counted in chunks; of 5 experts most get blocks of 64 rows."""
    ops.register()
    given = support.make(tokens, **{"hidden": 128, "inner": 256, "experts": 5, "top_k": 2, **CASES[name]}).to(dtype)
    given.ids[0, 0] = -1
    found = torch.ops.eff.moe_blocks_v1(*device(given.args))
    exact = exact_of(given)
    bound = max(3e-5, 6 * torch.finfo(dtype).eps)
    assert support.error(found.cpu(), exact) < bound
    again = torch.ops.eff.moe_blocks_v1(*device(given.args))
    assert torch.equal(found, again), "two runs differ"


@pytest.mark.parametrize("block", [16, 64, 128])
def test_every_size_of_blocks_and_every_config(block):
    from effcompile.codegen.triton import launch, moe, moe_first, moe_second
    from effcompile.codegen.triton.moe_parts import Weight

    given = support.make(500, 512, 256, 6, 2).to(torch.bfloat16)
    exact = exact_of(given)
    args = device(given.args)
    arch = launch.architecture_of(args[0])
    first = moe_first.configs(moe_first.form("bf16", arch, Weight.of(args[3], False), 2, block), arch)
    second = moe_second.configs(moe_second.form("bf16", arch, Weight.of(args[5], False), block), arch)
    for pair in zip(first, second):
        found = moe.experts(*args, block=block, config=pair)
        assert support.error(found.cpu(), exact) < 6 * torch.finfo(torch.bfloat16).eps, pair


@pytest.mark.parametrize("spans", [(1, 0), (128, 128)])
@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("tokens", [3, 400])
def test_weights_in_8_bits(tokens, codes, spans):
    ops.register()
    given = support.make(tokens, 256, 384, 4, 2).to(torch.bfloat16)
    packed = [moe_quantized.quantize(w, False, codes, *spans) for w in (given.w1, given.w2)]
    x, ids, weights, _, _, _, _, *gate = given.args
    args = (x, ids, weights, *packed[0], None, *packed[1], None, *spans, *gate)
    meant = [moe_quantized.dequantize(*pair, False, *spans, torch.float32) for pair in packed]
    exact = exact_of(support.Experts(x, ids, weights, meant[0], None, meant[1], None))
    found = torch.ops.eff.moe_quantized_v1(*device(args))
    assert support.error(found.cpu(), exact) < 6 * torch.finfo(torch.bfloat16).eps


def test_nothing_is_read_on_the_host_and_a_cuda_graph_holds_it():
    ops.register()
    given = support.make(64, 128, 128, 8, 2).to(torch.bfloat16)
    args = device(given.args)
    wanted = torch.ops.eff.moe_blocks_v1(*args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.eff.moe_blocks_v1(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.eff.moe_blocks_v1(*args)
    args[1].copy_(args[1].flip(0))  # other experts, the same graph
    graph.replay()
    assert torch.equal(out, torch.ops.eff.moe_blocks_v1(*args))
    assert not torch.equal(out, wanted)


def test_what_no_expert_gets_is_never_multiplied():
    ops.register()
    given = support.make(300, 128, 128, 8, 2)
    given.ids[7] = torch.tensor([-1, 8])
    given.x[7] = torch.nan
    found = torch.ops.eff.moe_blocks_v1(*device(given.args)).cpu()
    assert torch.isfinite(found).all()
    assert torch.equal(found[7], torch.zeros_like(found[7]))


def test_a_compiled_block_runs_the_kernels():
    from effcompile.models.mixtral import Mixtral, MixtralConfig

    torch.manual_seed(0)
    model = Mixtral(MixtralConfig.tiny()).eval().cuda()
    ids = torch.randint(0, 64, (2, 24), device="cuda")
    with torch.no_grad():
        wanted = model.double()(ids)
        model.float()
        found = torch.compile(model, backend="eff", options={"moe": "block-aligned", "require": {"moe": "all"}})(ids)
    dispatches = [site["dispatch"] for graph in eff.report()["graphs"] for site in graph["experts"]]
    assert dispatches == ["block-aligned"] * 2
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)
