"""Launch a kernel: on a GPU, in Triton's interpreter, or into the graph that TorchInductor compiles.

`traced` is how one launch serves two ops. The custom op (`eff::flash_v1`) runs the jit function itself; its twin for compiled
graphs (`eff::flash_triton_v1`, a `torch.library.triton_op`) wraps it, so that TorchInductor sees the kernel and AOTInductor
packs its binary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effcompile.codegen.triton.kernel import WORDS, Config, Constant, Form, Kernel, architecture
from effcompile.core.errors import EffError

WIDEST = 256
SMALL = "interpreter"
"""The architecture that tensors on the CPU stand for; its configs are small tiles."""


def architecture_of(x: Tensor) -> str:
    """Return which of the tuned architectures a tensor's device is, or is assumed to be."""
    assumed = _ASSUMED.get()
    if assumed is not None:
        return assumed
    if x.device.type != "cuda":
        return SMALL
    from effcompile.targets.detect import detect

    return architecture(detect("cuda").device.compute)


_ASSUMED: ContextVar[str | None] = ContextVar("assumed architecture", default=None)


@contextlib.contextmanager
def assume(compute: str) -> Iterator[None]:
    """Choose configs for a chip that is not here, while a graph is traced for it."""
    token = _ASSUMED.set(architecture(compute))
    try:
        yield
    finally:
        _ASSUMED.reset(token)


@dataclass(frozen=True)
class Launch:
    """Hold one launch: which binary, how many programs, and the runtime arguments in the order of the kernel's parameters."""

    kernel: Kernel
    form: Form
    config: Config
    grid: tuple[Any, ...]
    arguments: tuple[Any, ...]


_KEPT: ContextVar[list[Launch] | None] = ContextVar("launches that are kept", default=None)


@contextlib.contextmanager
def keeping() -> Iterator[list[Launch]]:
    """Keep launches in place of launching, so that fake tensors tell which binaries a graph needs; outputs hold nothing."""
    kept: list[Launch] = []
    token = _KEPT.set(kept)
    try:
        yield kept
    finally:
        _KEPT.reset(token)


def run(
    kernel: Kernel, grid: tuple[Any, ...], runtime: Sequence[Any], form: Form, config: Config, traced: bool = False
) -> None:
    """Launch `grid` programs; `runtime` are the runtime arguments, which come before the constexpr ones in every kernel."""
    if (kept := _KEPT.get()) is not None:
        kept.append(Launch(kernel, form, config, grid, tuple(runtime)))
        return
    constants = {**dict(form.constants), **config.constants}
    if traced:
        from torch.library import wrap_triton

        wrap_triton(kernel.function)[grid](*runtime, **constants, **config.options)
    else:
        kernel.function[grid](*runtime, **constants, **config.options, enable_fp_fusion=True)


def dense_rows(x: Tensor) -> Tensor:
    """Return x with its last dimension contiguous, which every kernel takes for granted."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def word(x: Tensor) -> str:
    """Return Triton's word for the tensor's dtype.

    Raises:
        EffError: EFF-K103 for a dtype that no kernel reads.
    """
    name = str(x.dtype).removeprefix("torch.")
    if name not in WORDS:
        raise EffError("EFF-K103", f"the Triton kernels read {', '.join(WORDS)}, not {name}", hint="cast q, k and v")
    return WORDS[name]


def check(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """Check what every attention kernel asks of its operands.

    Raises:
        EffError: EFF-K103 for dtypes, EFF-K104 for shapes.
    """
    others = [x for x in (k, v) if x is not None]
    word(q)
    if any(x.dtype != q.dtype or x.device != q.device for x in others):
        raise EffError("EFF-K103", "q, k and v must have one dtype and one device")
    if q.shape[1] % k.shape[1]:
        raise EffError("EFF-K104", f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key/value heads")
    if any(x.shape[-1] > WIDEST for x in (q, *others)):
        raise EffError("EFF-K104", f"the Triton kernels take head dimensions up to {WIDEST}", hint="use SDPA")


def precision(dtype: str, arch: str) -> str:
    """Return how float32 products are taken: three TF32 products where there are such units, else plain float32."""
    return "tf32x3" if dtype == "fp32" and arch.startswith("sm_") else "ieee"


def positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return q and a scale above 0 with the same products: the kernels take a maximum before they scale."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def strides(*operands: Tensor) -> tuple[list[int], int]:
    """Return the batch and head strides of `[B, H, S, D]` operands over a step, and the step: 8 where it divides them all.

    Triton sees an alignment in the code where it would have to guess it from the arguments: 72 * 8 bytes is enough for the
    widest load.
    """
    found = [x.stride(d) if x.shape[d] > 1 else 0 for x in operands for d in (0, 1)]
    rows = [x.stride(2) if x.shape[2] > 1 else 0 for x in operands]
    step = 8 if all(n % 8 == 0 for n in (*found, *rows)) else 1
    return [n // step for n in found], step


def page_strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[list[int], int]:
    """Return the strides of q `[B, H, Q, D]` and the paged k, v `[B', H, P, size, D]` over a step, and the step, as `strides` does.

    A pool (B' = 1) has the batch stride 0.
    """
    found = [
        x.stride(d) if x.shape[d] > 1 else 0 for x, d in ((q, 0), (q, 1), *((x, d) for x in (k, v) for d in range(3)))
    ]
    rows = [int(x.stride(x.dim() - 2)) for x in (q, k, v)]
    step = 8 if all(n % 8 == 0 for n in (*found, *rows)) else 1
    return [n // step for n in found], step


def splits(owners: int, tiles: int, like: Tensor) -> int:
    """Return into how many parts the keys of each owner are cut: twice the cores are kept busy, a part has two tiles or more."""
    arch = architecture_of(like)
    if arch == SMALL:
        return min(2, max(1, tiles))
    from effcompile.targets import devices
    from effcompile.targets.detect import detect

    assumed = _ASSUMED.get() is not None
    cores = (
        next(d.cores for d in devices() if d.compute == arch and d.common) if assumed else detect("cuda").device.cores
    )
    # A number, also where a length is symbolic: the merge has a tile of that many parts.
    return int(max(1, min(cdiv(2 * cores, max(1, owners)), cdiv(tiles, 2), 64)))


def ranges(begin: Tensor | None, end: Tensor | None, batch: int, keys: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (first key, one past the last) int32 `[B]`; without ranges any tensor will do, since nothing reads it."""
    if begin is None and end is None:
        return like, like
    if begin is None:
        begin = torch.zeros(batch, dtype=torch.int32, device=like.device)
    if end is None:
        end = torch.full((batch,), keys, dtype=torch.int32, device=like.device)
    return tuple(x.to(torch.int32).expand(batch).contiguous() for x in (begin, end))  # type: ignore[return-value]


def choose(configs: Sequence[Config], fetched: Sequence[Tensor], traced: bool) -> Config:
    """Return the first config that can be launched: descriptors need aligned tensors, and no graph holds one."""
    return next(c for c in configs if not c.descriptors or (not traced and all(describable(x) for x in fetched)))


def describable(x: Tensor) -> bool:
    """Tell whether TMA can address a tensor: it is not empty, and its base and strides are multiples of 16 bytes."""
    if x.numel() == 0 or x.data_ptr() % 16:
        return False
    return all(int(x.stride(d)) * x.element_size() % 16 == 0 for d in range(x.dim() - 1))


def describe(x: Tensor, config: Config, name: str) -> Any:
    """Return the TMA descriptor of a tensor where the config asks for one, else the tensor."""
    box = dict(config.descriptors).get(name)
    if box is None:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(box))


def cdiv(number: int, by: Any) -> int:
    """Return number / by, rounded up."""
    return -(-number // int(by))


def fixed(*groups: Mapping[str, Constant], **more: Constant) -> tuple[tuple[str, Constant], ...]:
    """Return the constants of a form from groups of them; a symbolic truth or size becomes one that is guarded."""
    together = {**{name: value for group in groups for name, value in group.items()}, **more}
    return tuple((name, _plain(value)) for name, value in together.items())


def _plain(value: Any) -> Constant:
    if isinstance(value, torch.SymBool):
        return bool(value)
    return int(value) if isinstance(value, torch.SymInt) else value


def typed(pairs: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return (parameter, type) pairs from (parameters separated by blanks, type) ones."""
    return tuple((name, kind) for names, kind in pairs for name in names.split())


def divisor(block: int, most: int) -> int:
    """Return the largest power of two that divides a block and is at most `most`."""
    return min(most, block & -block)


def power(width: int) -> int:
    """Return the least power of two that is at least `width`, and at least 1."""
    return 1 << max(0, width - 1).bit_length()
