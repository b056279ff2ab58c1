"""Define `eff::linear_rows_v1`: x @ weight^T + bias for a few rows, at the rate of memory.

A step of decoding is bound by reading weights. The BLAS of torch's wheel reads them with one core at one row: on a Zen 4 with two
cores 12 GB/s of SmolLM2's head where this kernel reads 24 (step-table, float32). `cpp/linear_rows.cpp` reads with all cores and
serves up to eight rows from one reading. The op's implementation on CPU is that kernel, called by the dispatcher itself; where it
cannot be built, or for other operands, the op is `aten.linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from effcompile.ops import native
from effcompile.ops.attention import define

NAME = "eff::linear_rows_v1"
MOST = 8
"""Rows up to which the kernel takes a call."""


def linear_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x `[..., K]` times weight `[N, K]` transposed, plus bias `[N]`: `[..., N]` in x's dtype."""
    if x.device.type == "cpu":
        native.library(native.ROWS)  # the dispatcher calls the kernel from then on
    return F.linear(x, weight, bias)


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def register() -> None:
    """Register the op, once."""
    define(NAME, "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", linear_rows, _fake)
