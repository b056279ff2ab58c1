"""Find weights that lie on a grid of few bits, as those of a quantizer that were turned back into floats do.

Codes are accepted where every number of a block is a whole number of steps, to float32's rounding, so that no number changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEAR = 1e-4  # of a step: what float32 leaves of a number that is a whole one
MIDDLE = {4: 8, 8: 128}
"""The code that means 0 unless an operator is given another."""
_FULL = {4: (8, 7, *range(15, 8, -1), *range(6, 0, -1)), 8: (127, 128)}
"""How many steps the largest magnitude of a block may be, the usual ones first; of 8 bits only those that quantizers leave."""


@dataclass(frozen=True)
class Grid:
    """Hold weights `[..., K]` as (code - zero) * step: codes `[..., K]` in uint8, steps and zeros `[..., K / block]`."""

    codes: Tensor
    steps: Tensor
    zeros: Tensor
    bits: int
    block: int

    @property
    def plain(self) -> bool:
        """Tell whether every zero is the middle of the codes."""
        return bool((self.zeros == MIDDLE[self.bits]).all())

    def numbers(self) -> Tensor:
        """Return what the codes mean, in float64."""
        codes = self.codes.unflatten(-1, (-1, self.block)).double() - self.zeros.double()[..., None]
        return (codes * self.steps.double()[..., None]).flatten(-2)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Return bytes of codes `[..., n]`; of two codes in a byte the first is the low half, and an odd one is followed by 0."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = torch.cat([codes, torch.zeros_like(codes[..., :1])], -1)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def grid_of(weight: Tensor, bits: int, block: int) -> Grid | None:
    """Return the codes of float32 weights `[..., K]`; None where a number of a block lies between two of them.

    With 8 bits the zero is the middle, and the largest magnitude of a block 127 or 128 steps.
    """
    width = weight.shape[-1]
    if width % block or weight.dtype != torch.float32:
        return None
    blocks = weight.detach().reshape(-1, block)
    if _search(blocks[:1], bits) is None:
        return None  # most weights show in their first block
    found = _search(blocks, bits)
    if found is None:
        return None
    codes, steps, zeros = found
    lead = weight.shape[:-1]
    return Grid(codes.reshape(weight.shape), steps.reshape(*lead, -1), zeros.reshape(*lead, -1), bits=bits, block=block)


def _search(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return codes, steps and zeros of blocks `[n, block]`, or None where one of them has none."""
    top, middle = (1 << bits) - 1, MIDDLE[bits]
    largest = blocks.abs().amax(1)
    codes = torch.full(blocks.shape, middle, dtype=torch.uint8)
    steps, zeros = torch.ones_like(largest), torch.full(largest.shape, middle, dtype=torch.uint8)
    left = largest > 0  # a block of zeros is one whatever its step is
    for count in _FULL[bits]:
        if not left.any():
            break
        step = largest[left] / count
        exact = blocks[left] / step[:, None]
        whole = exact.round()
        low, high = (-whole.amin(1)).clamp_min(0), (top - whole.amax(1)).clamp_max(top)
        zero = torch.full_like(low, middle).clamp(min=low, max=high.maximum(low))
        fits = ((exact - whole).abs() <= NEAR).all(1) & (low <= high)
        if bits == 8:
            fits &= zero == middle
        (places,) = left.nonzero(as_tuple=True)
        places = places[fits]
        steps[places], zeros[places] = step[fits], zero[fits].to(torch.uint8)
        codes[places] = (whole[fits] + zero[fits, None]).to(torch.uint8)
        left[places] = False
    return None if left.any() else (codes, steps, zeros)
