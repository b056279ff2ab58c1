"""Emit through TorchInductor.

`compile_fx` gets the rewritten graph, never a rewriting `inner_compile`: that would poison the caches. What comes back is wrapped
in a plain function, because the minifier misreads the callable that Inductor marks as boxed.
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
    with batched(), from_their_start():
        compiled = compile_fx(graph, list(example_inputs), config_patches=settings or None)

    def run(*args: Any) -> Any:
        return compiled(*args)

    return run
