"""Hold the Triton kernels: one a file, checked in Triton's interpreter, cross-compiled to every GPU without one.

Every kernel is the GPU body of an op whose meaning is plain PyTorch in `effcompile/ops/`. Its file holds the jit function, its
compile-time *forms* and its *configs* per architecture (`kernel.py` says what these are), and one function that launches it; that
file alone imports Triton, and it is imported when a kernel is asked for. `parts.py` has the device functions that kernels share,
`launch.py` what launches share, `cross.py` compiles for a GPU that is not here and reads the binary's registers, spills, shared
memory and matrix instructions, which `tests/golden/triton_resources.json` pins for the default configs.

Each launch serves two ops, because TorchInductor opens a `triton_op` on every device and cannot compile it for a CPU:

- `eff::flash_v1` (a custom op: reference body, fake) gets the launch as its CUDA implementation. It is opaque to compilers.
- `eff::flash_triton_v1` is a `torch.library.triton_op` around the same launch, for CUDA graphs: TorchInductor compiles the kernel
  into the graph and AOTInductor packs its binary.

Nothing chooses these kernels where attention is exact and dense: on CUDA that stays SDPA (cuDNN, FlashAttention) until a
measured kernel beats it. They are for what SDPA has not: LSE, block lists, pages, scores of blocks and keys, int8 products.
All take the maximum of a row over scores before they scale, so they hand on a positive scale; all sum in float32; fused
multiply-add is asked for in so many words, since Triton's default for it changes between versions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from effcompile.codegen.triton.kernel import Kernel

LAUNCHES = {
    "eff::attention_blocks_v1": "attention_blocks:attend",
    "eff::attention_epilogue_v1": "attention_blocks:attend_epilogue",
    "eff::flash_v1": "flash:attend",
    "eff::block_sparse_v1": "block_sparse:attend",
    "eff::paged_decode_v1": "decode:attend",
    "eff::pooled_scores_v1": "pooled:score",
    "eff::antidiagonal_mass_v1": "antidiagonal:mass",
    "eff::column_sums_v1": "column_sums:add_up",
    "eff::probe_scores_v1": "probe:score",
    "eff::int8_attention_v1": "int8:attend",
    "eff::int8_blocks_v1": "int8_blocks:attend",
    "eff::kv_attention_token8_v1": "kv_steps:attend_token8",
    "eff::kv_attention_grouped_v1": "kv_steps:attend_grouped",
    "eff::kv_attention_rows_v1": "kv_steps:attend_rows",
    "eff::kv_attention_planes_v1": "kv_steps:attend_planes",
    "eff::kv_attention_mixed_v1": "kv_steps:attend_mixed",
    "eff::moe_blocks_v1": "moe:experts",
    "eff::moe_quantized_v1": "moe:quantized",
}
"""Give for each op the file and the function that launches its kernel."""


@functools.cache
def installed() -> bool:
    """Tell whether Triton can be imported here."""
    return importlib.util.find_spec("triton") is not None


def kernels() -> tuple[Kernel, ...]:
    """Return every kernel that is declared; imports Triton."""
    files = dict.fromkeys(place.partition(":")[0] for place in LAUNCHES.values())
    modules = [importlib.import_module(f"{__name__}.{file}") for file in files]
    return tuple(kernel for module in modules for kernel in getattr(module, "KERNELS", ()))


def traced_name(op: str) -> str:
    """Return the name of an op's twin for compiled graphs: `eff::flash_v1` has `eff::flash_triton_v1`."""
    stem, _, version = op.rpartition("_")
    return f"{stem}_triton_{version}"


def register(references: dict[str, Callable[..., Any]], opaque: tuple[str, ...] = ()) -> None:
    """Give the ops their CUDA implementation and their twins, once; without Triton the reference bodies stay.

    `references` are the bodies by op name: a twin takes its signature from them. Ops in `opaque` have no twin: how they
    are launched depends on data, or on how many rows there are.
    """
    if not installed():
        return
    for op in (*references, *opaque):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"):
            torch.library.impl(op, "cuda", _launch(LAUNCHES[op]))
    for op, reference in references.items():
        namespace, name = traced_name(op).split("::")
        if not hasattr(getattr(torch.ops, namespace), name):
            twin = traced(op)
            twin.__signature__ = inspect.signature(reference, eval_str=True)  # type: ignore[attr-defined]
            torch.library.triton_op(traced_name(op), twin, mutates_args=())


def launcher(op: str) -> Callable[..., Any]:
    """Return the function that launches an op's kernel."""
    return _function(LAUNCHES[op])


def _function(place: str) -> Callable[..., Any]:
    file, _, name = place.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"{__name__}.{file}"), name)
    return found


def _launch(place: str) -> Callable[..., Any]:
    """Return the CUDA implementation: the launch on the operands' own device."""

    def launch(*arguments: Any) -> Any:
        with torch.cuda.device(arguments[0].device):
            return _function(place)(*arguments)

    return launch


def traced(op: str) -> Callable[..., Any]:
    """Return the launch of an op's kernel for a graph that is being traced: the body of the twin."""

    def trace(*arguments: Any, **named: Any) -> Any:
        return _function(LAUNCHES[op])(*arguments, **named, traced=True)

    return trace
