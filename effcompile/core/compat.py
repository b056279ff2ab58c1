"""Ask torch what it can do, once, here.

Features are detected, never version strings compared. Supported: torch 2.11 to 2.15.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch


def dynamo_fake_mode() -> Any | None:
    """Return the FakeTensorMode of the Dynamo compilation that is under way, or None outside one."""
    context = torch._guards.TracingContext.try_get()
    return None if context is None else context.fake_mode


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


def higher_order_ops() -> tuple[type, ...]:
    """Return the type of torch's higher-order operators."""
    from torch._ops import HigherOrderOperator

    return (HigherOrderOperator,)
