"""Define `eff::linear_v1`: x @ weight^T + bias through oneDNN.

TorchInductor lowers `mkldnn::_linear_pointwise` itself only for frozen weights; as an op of our own the weight stays an ordinary
input, so that an optimizer step or a LoRA swap is seen. oneDNN packs the weight inside the call, which costs 1 to 5 % at 512 rows
and up.
"""

from __future__ import annotations

import torch

from effcompile.ops.attention import define


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x `[..., K]` times weight `[N, K]` transposed, plus bias `[N]`: `[..., N]` in x's dtype (float32 or bfloat16)."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def register() -> None:
    """Register the op, once."""
    define("eff::linear_v1", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", linear, _fake)
