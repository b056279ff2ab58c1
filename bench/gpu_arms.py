"""Build the ways of running one attention on a GPU: cuDNN, FlashAttention, FlexAttention, and our kernels.

An arm owns no operands: it is a function of them, and `Rotating` hands it another set each time, so that no arm finds
those of the last call in L2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.exact import Sample
from bench.manifest import scrub

Operands = tuple[Tensor, ...]
L2_BYTES = 60 * 2**20


@dataclass(frozen=True)
class Arm:
    """Hold one way: a function of the operands, and how its result is compared with float64; or why there is none."""

    run: Callable[..., Any] | None
    compare: Callable[[Any], Mapping[str, Any]] = lambda result: {}
    reason: str = ""

    def check(self, operands: Operands) -> tuple[dict[str, Any], bool]:
        """Run once and compare; return what is known and whether the arm may be timed."""
        if self.run is None:
            return {"skipped": self.reason}, False
        try:
            known = dict(self.compare(self.run(*operands)))
        except Exception as error:
            return {"error": scrub(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")}, False
        return known, bool(known["numerics"]["within"])


@dataclass
class Rotating:
    """Call a function on the next set of operands."""

    run: Callable[..., Any]
    sets: Sequence[Operands]
    order: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = itertools.cycle(range(len(self.sets)))

    def __call__(self) -> Any:
        """Run it."""
        return self.run(*self.sets[next(self.order)])


def operand_sets(make: Callable[[int], Operands]) -> list[Operands]:
    """Return sets of operands from seeds, as many as it takes to fill L2 twice, and at most eight."""
    first = make(0)
    size = sum(x.numel() * x.element_size() for x in first)
    return [first, *(make(seed) for seed in range(1, min(8, math.ceil(2 * L2_BYTES / max(size, 1)) + 1)))]


def sdpa(backend: str, exact: Sample, **options: Any) -> Arm:
    """Return SDPA pinned to one backend (CUDNN_ATTENTION, FLASH_ATTENTION)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)

    return Arm(run, lambda result: {"numerics": exact.numerics(result)})


def flex(lists: Sequence[Tensor], block: int, length: int, scale: float, exact: Sample) -> Arm:
    """Return compiled FlexAttention over (partial, full) lists of blocks, the partial ones causal."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    compiled = torch.compile(flex_attention, dynamic=False)
    blocks = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=(block, block), mask_mod=mask, seq_lengths=(length, length))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return compiled(q, k, v, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    return Arm(run, lambda result: {"numerics": exact.numerics(result)})


def ours(run: Callable[..., Any], exact: Sample) -> Arm:
    """Return an arm of ours, which gives (output, LSE)."""

    def compare(result: tuple[Tensor, Tensor]) -> dict[str, Any]:
        error = exact.lse_error(result[1])
        return {"numerics": exact.numerics(result[0]), "lse_error": float(f"{error:.3g}")}

    return Arm(run, compare)


def estimator(run: Callable[[Tensor, Tensor], Tensor], operands: Operands, rows: int = 1024) -> Arm:
    """Return an estimator of ours; it is compared on the first rows, with the same op on the CPU in float64."""

    def compare(result: Tensor) -> dict[str, Any]:
        short = tuple(x[:, :, :rows].contiguous() for x in operands[:2])
        got = run(*short).double().cpu()
        exact = run(*(x.double().cpu() for x in short))
        gone = exact.isinf()
        error = float((got - exact).masked_fill(gone, 0.0).abs().max())
        # Products of 16-bit numbers are exact in float32; what is left are sums of some thousand terms.
        allowed = 1e-4 * float(exact.masked_fill(gone, 0.0).abs().max())
        within = torch.equal(got.isinf(), gone) and error <= allowed
        return {"numerics": {"error": float(f"{error:.3g}"), "allowed": float(f"{allowed:.3g}"), "within": within}}

    return Arm(lambda q, k, *rest: run(q, k), compare)
