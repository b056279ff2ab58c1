"""Check how kernels join their ops: a CUDA implementation, and a twin that opens into the kernel in a graph for a GPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import _config
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

from effcompile import ops
from effcompile.codegen import triton as kernels
from effcompile.codegen.triton import launch
from tests.ops.test_sparse_ops import cases


def overload(name: str) -> torch._ops.OpOverload:
    """Return the default overload of an op."""
    namespace, short = name.split("::")
    return getattr(getattr(torch.ops, namespace), short).default


CACHES = tuple(f"eff::kv_attention_{form}_v1" for form in ("token8", "grouped", "rows", "planes", "mixed"))
EXPERTS = ("eff::moe_blocks_v1", "eff::moe_quantized_v1")
BLOCKS = ("eff::attention_blocks_v1", "eff::attention_epilogue_v1", "eff::int8_blocks_v1")
OPAQUE = (*BLOCKS, *CACHES, *EXPERTS)


@pytest.mark.parametrize("op", sorted(set(kernels.LAUNCHES) - set(OPAQUE)))
def test_every_kernel_joins_its_op(op: str) -> None:
    ops.register()
    ops.register()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")
    meaning, twin = overload(op)._schema, overload(kernels.traced_name(op))._schema
    assert [(x.name, str(x.type)) for x in twin.arguments] == [(x.name, str(x.type)) for x in meaning.arguments]
    assert [str(x.type) for x in twin.returns] == [str(x.type) for x in meaning.returns]


@pytest.mark.parametrize("name", list(cases()))
def test_a_twin_opens_into_its_kernel_for_a_gpu_that_is_not_here(name: str) -> None:
    op, args = cases()[name]
    # A build of torch for CPUs has no CUDA tensors, not even fake ones; which chip is meant is assumed instead.
    with FakeTensorMode() as mode, launch.assume("sm_90"):
        given = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
        graph = make_fx(kernels.traced(op._schema.name))(*given)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert any("triton_kernel_wrapper" in target for target in targets), targets
    expected = op(*args)
    values = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    flat = values if isinstance(values, (tuple, list)) else (values,)
    for value, want in zip(flat, expected if isinstance(expected, tuple) else (expected,)):
        assert (value.meta["val"].shape, value.meta["val"].dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize("name", list(cases()))
def test_a_twin_keeps_lengths_symbolic(name: str) -> None:
    """A graph for any batch and any number of keys (or pages): they stay symbols, head dimensions become numbers."""
    op, args = cases()[name]
    with launch.assume("sm_90"), _config.patch(use_duck_shape=False):
        graph = make_fx(kernels.traced(op._schema.name), tracing_mode="symbolic")(*args)
    q, k = (node.meta["val"].shape for node in list(graph.graph.nodes)[:2])
    for size in (q[0], k[2]):
        assert isinstance(size, torch.SymInt)
        assert size.node.expr.free_symbols, "a length became a number"
    assert not any(node.op == "call_function" and "item" in str(node.target) for node in graph.graph.nodes)


def test_an_op_without_a_kernel_has_no_cuda_implementation() -> None:
    ops.register()
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("eff::linear_v1", "CUDA")


@pytest.mark.parametrize("op", OPAQUE)
def test_an_op_whose_launch_depends_on_data_has_no_twin(op: str) -> None:
    ops.register()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")
    assert not hasattr(torch.ops.eff, kernels.traced_name(op).partition("::")[2])
