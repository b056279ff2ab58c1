"""Emit through TorchInductor.

`compile_fx` gets the rewritten graph, never a rewriting `inner_compile`: that would poison the caches. What comes back is wrapped
in a plain function, because the minifier misreads the callable that Inductor marks as boxed.

TorchInductor's key of a graph's generated C++ names its settings, and not the instruction set that it was written for:
`compile_graph` sets the width of a vector (`cpp.simdlen`) to what TorchInductor picks anyway. `core/processor.py` says what happens
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from effcompile.codegen.cpp_batch import batched
from effcompile.codegen.layer_outputs import from_their_start


def compile_graph(
    graph: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None, patches: Mapping[str, Any] | None
) -> Callable[..., Any]:
    """Run `compile_fx` with a mode's settings and the given patches."""
    from torch._inductor.compile_fx import compile_fx

    settings = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    settings.update(patches or {})
    if "cpp.simdlen" not in settings and _has_cpu_tensors(graph, example_inputs):
        settings["cpp.simdlen"] = _vector_bits()
    with batched(), from_their_start():
        compiled = compile_fx(graph, list(example_inputs), config_patches=settings or None)

    def run(*args: Any) -> Any:
        return compiled(*args)

    return run


def _has_cpu_tensors(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Tell whether C++ may be generated for the graph; to ask for the instruction set costs a process 1.5 s."""
    values = [*example_inputs, *(node.meta.get("val") for node in graph.graph.nodes)]
    devices = {value.device.type for value in values if isinstance(value, torch.Tensor)}
    return not devices or "cpu" in devices


def _vector_bits() -> int:
    """Return the width of the vectors that TorchInductor writes for, 0 where it writes for none."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return int(pick_vec_isa().bit_width())
