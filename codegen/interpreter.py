"""Emit by running the graph op by op, as eager PyTorch does: the cheap emission for tests and for finding a wrong number.

Everything before this stage is the same as for TorchInductor, so a difference from eager is a wrong rewrite and never a wrong
TorchInductor kernel. It compiles nothing and is no faster than eager.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def interpret_graph(graph: fx.GraphModule) -> Callable[..., Any]:
    """Return a function of the graph's inputs that runs its ops one after the other; gradients flow as in eager."""

    def run(*args: Any) -> Any:
        return graph(*args)

    return run
