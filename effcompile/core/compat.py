"""Ask torch what it can do, once, here.

Features are detected, never version strings compared. Supported: torch 2.11 to 2.15.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch


def dynamo_fake_mode() -> Any | None:
    """Return the FakeTensorMode of the Dynamo compilation that is under way, or None outside one."""
    context = torch._guards.TracingContext.try_get()
    return None if context is None else context.fake_mode


def compilation_contexts() -> tuple[Callable[[], AbstractContextManager[Any]], ...]:
    """Return what enters the contexts of the Dynamo compilation that is under way again, after it has ended."""
    from torch._guards import CompileContext, TracingContext, compile_context, tracing

    found: list[Callable[[], AbstractContextManager[Any]]] = []
    if (trace := TracingContext.try_get()) is not None:
        found.append(functools.partial(tracing, trace))
    if (compilation := CompileContext.try_get()) is not None:
        found.append(functools.partial(compile_context, compilation))
    return tuple(found)


@functools.cache
def has_invoke_subgraph() -> bool:
    """Tell whether repeated layers can be called through the `invoke_subgraph` higher-order op."""
    return hasattr(torch.ops.higher_order, "invoke_subgraph")


@functools.cache
def list_of_custom_passes() -> bool:
    """Tell whether an Inductor pass slot takes a list (2.13 and later)."""
    from torch._inductor import custom_graph_pass

    return hasattr(custom_graph_pass, "CustomInferenceAwareGraphPass")


@functools.cache
def compile_fx_names_region() -> bool:
    """Tell whether `compile_fx` takes `compile_region_name` (2.13 and later)."""
    from torch._inductor.compile_fx import compile_fx

    return "compile_region_name" in inspect.signature(compile_fx).parameters


@functools.cache
def has_mkldnn_linear() -> bool:
    """Tell whether oneDNN's fused linear op is built in and usable."""
    return bool(torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


@functools.cache
def has_grouped_mm() -> bool:
    """Tell whether torch multiplies groups of rows by a matrix each (2.8 and later, under this name)."""
    return hasattr(torch, "_grouped_mm")


def higher_order_ops() -> tuple[type, ...]:
    """Return the type of torch's higher-order operators."""
    from torch._ops import HigherOrderOperator

    return (HigherOrderOperator,)


def allow_data_dependent_sizes(mode: Any) -> None:
    """Let ops of ours create sizes that are known only at run time, inside the shape environment of `mode`."""
    import dataclasses

    env = mode.shape_env
    if env is not None and not env.allow_dynamic_output_shape_ops:
        env.settings = dataclasses.replace(env.settings, allow_dynamic_output_shape_ops=True)


def forget_fresh_symbols(mode: Any) -> None:
    """Drop the record of run-time sizes that a fake run made: the graph is traced again before anything is compiled."""
    env = getattr(mode, "shape_env", None)
    if env is not None:
        env.pending_fresh_unbacked_symbols.clear()


def graph_module(root: Any, graph: Any) -> Any:
    """Return a graph module that makes its Python code when it is first called: passes hand on graphs that nobody runs."""
    try:
        from torch.fx._lazy_graph_module import _LazyGraphModule as GraphModule
    except ImportError:
        from torch.fx import GraphModule  # type: ignore[assignment]
    return GraphModule(root, graph)


def proxy_tracer() -> Any:
    """Return the tracer of the `make_fx` that is under way."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    assert mode is not None, "no make_fx is under way"
    return mode.tracer


def proxy_node(value: torch.Tensor, tracer: Any) -> Any | None:
    """Return the node that a tracer recorded for a tensor, or None: it is a constant of the graph."""
    from torch.fx.experimental.proxy_tensor import get_proxy_slot

    found = get_proxy_slot(value, tracer, None)
    return None if found is None or found.constant is not None else found.proxy.node


def track(value: torch.Tensor, node: Any, tracer: Any) -> None:
    """Let a tracer record `node` as what made a fake tensor of fixed layout."""
    from torch.fx import Proxy
    from torch.fx.experimental.proxy_tensor import track_tensor

    track_tensor(value, Proxy(node, tracer), constant=None, tracer=tracer)


def fake_on(storage: Any, like: Any) -> Any:
    """Return a fake tensor with the layout of `like` (fake, fixed sizes) that looks at `storage` (on meta)."""
    from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with disable_proxy_modes_tracing(), unset_fake_temporarily():
        bare = torch.empty(0, dtype=like.dtype, device="meta")
        bare.set_(storage, like.storage_offset(), like.shape, like.stride())
        return FakeTensor(like.fake_mode, bare, like.device)


class _Attributes(dict[str, Any]):
    """Answer attribute reads from a mapping, None for what is absent."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def flex_block_tuple(**fields: Any) -> tuple[Any, ...]:
    """Return the operands of a block mask in the order of this torch's `flex_attention` op; absent lists are None.

    Fields: seq_lengths, kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, BLOCK_SIZE, mask_mod.
    """
    from torch.nn.attention.flex_attention import BlockMask

    return BlockMask.as_tuple(_Attributes(fields))  # type: ignore[arg-type]


class _Named:
    """Answer every attribute with its own name, the pairs with two."""

    def __getattr__(self, name: str) -> Any:
        return (f"{name}[0]", f"{name}[1]") if name in ("seq_lengths", "BLOCK_SIZE") else name


def flex_block_fields(operands: Sequence[Any]) -> dict[str, Any]:
    """Return the operands of a block mask by name, undoing `flex_block_tuple`; the pairs are `seq_lengths[0]` and so on."""
    from torch.nn.attention.flex_attention import BlockMask

    return dict(zip(BlockMask.as_tuple(_Named()), operands, strict=True))  # type: ignore[arg-type]


def flex_kernel_options(q: Any, k: Any, v: Any) -> dict[str, Any]:
    """Return the complete kernel options for an inference call; TorchInductor fails on an incomplete dict."""
    from torch.nn.attention import flex_attention

    return dict(flex_attention._apply_kernel_options(q, k, v, False, {}))  # type: ignore[attr-defined]


def size_hint(environment: Any, expression: Any) -> int:
    """Return the value that an expression of sizes has for what was traced; later torch has another name for it."""
    hint = getattr(environment, "guarding_hint_or_throw", None) or environment.size_hint
    return int(hint(expression))


def symbolic_calls() -> AbstractContextManager[Any]:
    """Let composite operations run on fake tensors of symbolic sizes, in Python: torch 2.11 does it in C++ and asks for numbers."""
    from torch._dispatch.python import enable_python_dispatcher

    made: AbstractContextManager[Any] = enable_python_dispatcher()
    return made
