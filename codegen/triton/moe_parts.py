"""Hold what both products of experts are made of: device functions, and how a launch describes weights.

A program multiplies one block of rows by a tile of columns of its expert's weights. Weights may be numbers of the tokens' dtype, or
8 bits with scales; codes become numbers of the tokens' dtype in registers, which all of them are exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effcompile.codegen.triton import launch
from effcompile.codegen.triton.kernel import Config, Constant
from effcompile.codegen.triton.parts import widened
from effcompile.core.errors import EffError

FLOATS = 9
"""As a number of bits: 8, as floats (e4m3)."""


@triton.jit
def tile_of(blocks, TILES: tl.constexpr, GROUP_M: tl.constexpr):
    """Return (block, tile of columns) of this program: GROUP_M blocks share a tile of weights before the next tile comes."""
    program = tl.program_id(0)
    first = program // (GROUP_M * TILES) * GROUP_M
    size = tl.maximum(tl.minimum(blocks - first, GROUP_M), 1)
    inside = program % (GROUP_M * TILES)
    return first + inside % size, inside // size


@triton.jit
def load_block(base, rows, live, k, DEPTH: tl.constexpr, NEAT: tl.constexpr):
    """Load columns k of the rows at offsets `rows` (64 bit); dead rows and columns beyond DEPTH read 0."""
    addresses = base + rows[:, None] + k[None, :]
    if NEAT:
        return tl.load(addresses, mask=live[:, None], other=0.0)
    return tl.load(addresses, mask=live[:, None] & (k < DEPTH)[None, :], other=0.0)


@triton.jit
def load_weight(
    base, n, k, kind,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, NEAT: tl.constexpr,
):  # fmt: skip
    """Load weights `[K, N]` (inputs k, outputs n) of one expert as numbers of the type of `kind`.

    With COLUMNS outputs lie side by side and inputs STRIDE apart, else the other way round.
    """
    if COLUMNS:
        addresses = base + k[:, None] * STRIDE + n[None, :]
    else:
        addresses = base + k[:, None] + n[None, :] * STRIDE
    if NEAT:
        found = tl.load(addresses)
    else:
        found = tl.load(addresses, mask=(k < DEPTH)[:, None] & (n < WIDTH)[None, :], other=0)
    if BITS < 16:
        found = widened(found, BITS).to(kind.dtype.element_ty)
    return found


@triton.jit
def load_scales(base, n, k, WIDTH: tl.constexpr, DEPTH: tl.constexpr, SPAN_N: tl.constexpr, SPAN_K: tl.constexpr):
    """Load the scales of outputs n for inputs from k on, of one expert: `[ceil(WIDTH / SPAN_N), ceil(DEPTH / SPAN_K)]`."""
    places = n // SPAN_N
    if SPAN_K > 0:
        places = places * ((DEPTH + SPAN_K - 1) // SPAN_K) + k // SPAN_K
    return tl.load(base + places, mask=n < WIDTH, other=0.0)


@triton.jit
def gated(g, u, alpha, beta, limit, ACT: tl.constexpr, GATED: tl.constexpr, HAS_LIMIT: tl.constexpr):
    """Return act(g) * (u + beta), or act(g) without a gate; with HAS_LIMIT g is capped and u clamped first."""
    if HAS_LIMIT:
        g = tl.minimum(g, limit)
    if ACT == "silu":
        y = g / (1.0 + tl.exp2(g * (-1.4426950408889634 * alpha)))
    elif ACT == "gelu":
        y = g * 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) is the sigmoid of 2 z.
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        y = g / (1.0 + tl.exp2(inner * -2.885390081777927))
    elif ACT == "relu":
        y = tl.maximum(g, 0.0)
    elif ACT == "relu2":
        y = tl.maximum(g, 0.0)
        y = y * y
    else:
        y = g
    if GATED:
        if HAS_LIMIT:
            u = tl.minimum(tl.maximum(u, -limit), limit)
        y = y * (u + beta)
    return y


@dataclass(frozen=True)
class Weight:
    """Say how a launch reads one weight of all experts: logically `[E, out, in]`.

    `data` as it is stored, 8-bit floats as bytes; `scales` float32 `[E, ceil(out / span_out), ceil(in / span_in)]` or None; of
    inputs and outputs one lies side by side (`columns`: the outputs), the other `stride` apart, and experts `expert` apart.
    """

    data: Tensor
    scales: Tensor | None
    outputs: int
    inputs: int
    stride: int
    expert: int
    columns: bool
    bits: int
    span_out: int = 1
    span_in: int = 0

    @classmethod
    def of(
        cls, w: Tensor, transposed: bool, scales: Tensor | None = None, span_out: int = 1, span_in: int = 0
    ) -> Weight:
        """Describe `[E, out, in]`, or `[E, in, out]` where it is transposed; copied only where neither dimension is contiguous.

        Raises:
            EffError: EFF-K105 for spans that tiles cannot have.
        """
        bits = {torch.int8: 8, torch.float8_e4m3fn: FLOATS}.get(w.dtype, 8 * w.element_size())
        if scales is not None and (span_in % 16 or span_out < 1):
            raise EffError(
                "EFF-K105", f"scales of {span_out} outputs and {span_in} inputs; inputs go by multiples of 16"
            )
        logical = w.transpose(1, 2) if transposed else w
        if 1 not in (logical.stride(2), logical.stride(1)):
            logical = logical.contiguous()
        columns = logical.stride(2) != 1
        stride = int(logical.stride(2) if columns else logical.stride(1))
        data = logical.view(torch.uint8) if bits == FLOATS and not columns else logical
        if bits == FLOATS and columns:
            data = logical.transpose(1, 2).view(torch.uint8).transpose(1, 2)
        _, outputs, inputs = logical.shape
        told = None if scales is None else scales.to(torch.float32).contiguous()
        return cls(data, told, outputs, inputs, stride, int(logical.stride(0)), columns, bits, span_out, span_in)

    @property
    def word(self) -> str:
        """Return Triton's word for the type of the data."""
        if self.scales is None:
            return f"*{launch.word(self.data)}"
        return "*i8" if self.bits == 8 else "*u8"

    @property
    def constants(self) -> dict[str, Constant]:
        """Return the constexpr parameters that both products have for their weight."""
        sizes = {"W_STRIDE": self.stride, "COLUMNS": self.columns, "BITS": self.bits if self.scales is not None else 16}
        return {**sizes, "SPAN_N": self.span_out, "SPAN_K": self.span_in}

    @property
    def told(self) -> str:
        """Return the layout in a word, for the names of forms."""
        kind = {8: "int8", FLOATS: "fp8"}[self.bits] + f".{self.span_in}" if self.scales is not None else ""
        return kind + ("t" if self.columns else "")


def shaped(
    dtype: str, outputs: int, inputs: int, columns: bool = False, bits: int = 16, span_out: int = 1, span_in: int = 0
) -> Weight:
    """Return the description of contiguous weights that are not there, for forms that are compiled in tests."""
    kind: dict[str, Any] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    stored = {8: torch.int8, FLOATS: torch.uint8}.get(bits, kind[dtype])
    data, scales = torch.empty(0, dtype=stored), torch.empty(0) if bits < 16 else None
    return Weight(
        data,
        scales,
        outputs,
        inputs,
        outputs if columns else inputs,
        outputs * inputs,
        columns,
        bits,
        span_out,
        span_in,
    )


def tiled(shape_tile: tuple[int, int, int, int, int]) -> Config:
    """Return the config of (BLOCK_N, BLOCK_K, GROUP_M, warps, stages)."""
    n, k, group, warps, stages = shape_tile
    return Config((("BLOCK_N", n), ("BLOCK_K", k), ("GROUP_M", group)), warps, stages)
