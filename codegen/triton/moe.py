"""Run the experts of a layer on a GPU: rows in blocks of one expert each, two products, a sum.

Four launches for a few tokens, seven for many: what `moe_align.py` counts stays on the device, and programs beyond the rows in use
end at once. Between the products lies one tensor, what the gate leaves; the second product writes a row for each slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.codegen.triton import launch, moe_align, moe_first, moe_second
from effcompile.codegen.triton.kernel import WORDS, Config
from effcompile.codegen.triton.moe_parts import Weight
from effcompile.core.experts import ExpertsCall
from effcompile.ops import moe as op
from effcompile.ops import moe_quantized

KERNELS = (*moe_align.KERNELS, *moe_first.KERNELS, *moe_second.KERNELS)


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: str,
    layout: str,
    transposed: bool,
    side: str,
    alpha: float,
    beta: float,
    limit: float,
    *,
    block: int = 0,
    config: tuple[Config, Config] | None = None,
) -> Tensor:
    """Run `eff::moe_blocks_v1` (see effcompile/ops/moe.py) with the kernels where they take its dtype.

    `block` 0 takes rows in blocks of `block_rows`; `config` None takes the default of each product.

    Raises:
        EffError: EFF-M201 and EFF-M202 as the op does, EFF-K101 for the chip.
    """
    if not takes(x):
        return op.moe(x, ids, weights, w1, b1, w2, b2, act, layout, transposed, side, alpha, beta, limit)
    op.check(ExpertsCall(x, ids, weights, w1, b1, w2, b2, act, layout, transposed, side, alpha, beta, limit))
    both = Weight.of(w1, transposed), Weight.of(w2, transposed)
    return _run(x, ids, weights, both, (b1, b2), act, layout, side, (alpha, beta, limit), block, config)


def quantized(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    s1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    s2: Tensor,
    b2: Tensor | None,
    span_out: int,
    span_in: int,
    act: str,
    layout: str,
    transposed: bool,
    side: str,
    alpha: float,
    beta: float,
    limit: float,
    *,
    block: int = 0,
    config: tuple[Config, Config] | None = None,
) -> Tensor:
    """Run `eff::moe_quantized_v1` (see effcompile/ops/moe_quantized.py) with the kernels where they take dtype and spans.

    Raises:
        EffError: EFF-M201 and EFF-M202 as the op does, EFF-K101 for the chip.
    """
    tensors = (x, ids, weights, w1, s1, b1, w2, s2, b2)
    if not takes(x) or span_in % MOST_K:
        return moe_quantized.moe(*tensors, span_out, span_in, act, layout, transposed, side, alpha, beta, limit)
    moe_quantized.check(*tensors, span_out, span_in, act, layout, transposed, side)
    both = Weight.of(w1, transposed, s1, span_out, span_in), Weight.of(w2, transposed, s2, span_out, span_in)
    return _run(x, ids, weights, both, (b1, b2), act, layout, side, (alpha, beta, limit), block, config)


MOST_K = 128
"""Inputs that a tile has at most; scales for fewer inputs would change within a tile."""


def takes(x: Tensor) -> bool:
    """Tell whether the kernels read the dtype of the tokens."""
    return str(x.dtype).removeprefix("torch.") in WORDS


def block_rows(tokens: int, top_k: int, experts: int) -> int:
    """Return how many rows a block has: 16 where most experts get a few rows, more where they get many (not yet measured)."""
    if tokens <= experts:
        return 16
    return 64 if tokens * top_k <= 256 * experts else 128


def _run(
    x: Tensor,
    ids: Tensor,
    shares: Tensor,
    weight: tuple[Weight, Weight],
    bias: tuple[Tensor | None, Tensor | None],
    act: str,
    layout: str,
    side: str,
    numbers: tuple[float, float, float],
    block: int,
    config: tuple[Config, Config] | None,
) -> Tensor:
    tokens, hidden = x.shape
    top_k, count = ids.shape[1], weight[0].data.shape[0]
    slots = tokens * top_k
    if slots == 0 or hidden == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    x, ids, shares = launch.dense_rows(x), ids.contiguous(), shares.contiguous()
    shares = shares if takes(shares) else shares.float()
    arch, word, kind = launch.architecture_of(x), launch.word(x), launch.word(shares)
    block = block or (16 if arch == launch.SMALL else block_rows(tokens, top_k, count))
    rows = moe_align.align(ids, count, block)
    first = moe_first.form(
        word, arch, weight[0], top_k, block, act=act, layout=layout, limited=numbers[2] != 0, biased=bias[0] is not None,
        shared=side == "in", ids=kind,
    )  # fmt: skip
    second = moe_second.form(word, arch, weight[1], block, biased=bias[1] is not None, shared=side == "out", ids=kind)
    chosen = config or (moe_first.configs(first, arch)[0], moe_second.configs(second, arch)[0])
    inner = x.new_empty((rows.blocks * block, weight[1].inputs))
    parts = x.new_empty((slots, hidden))
    placed = (rows.order, rows.owner, rows.total, shares)
    told = [
        (w.data, w.data if w.scales is None else w.scales, x if b is None else b.contiguous())
        for w, b in zip(weight, bias)
    ]
    width = launch.cdiv(weight[1].inputs, chosen[0].constants["BLOCK_N"])
    sizes = (int(x.stride(0)) if tokens > 1 else hidden, weight[0].expert, slots, *numbers)
    launch.run(moe_first.KERNELS[0], (rows.blocks * width,), (x, *placed, *told[0], inner, *sizes), first, chosen[0])
    width = launch.cdiv(hidden, chosen[1].constants["BLOCK_N"])
    whole = (inner, *placed, *told[1], parts, weight[1].expert, slots)
    launch.run(moe_second.KERNELS[0], (rows.blocks * width,), whole, second, chosen[1])
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    last = moe_second.combine_form(word, hidden, top_k, f"*i{8 * ids.element_size()}")
    config_last = moe_second.combine_configs(last, arch)[0]
    grid = (tokens * launch.cdiv(hidden, config_last.constants["BLOCK_N"]),)
    launch.run(moe_second.KERNELS[1], grid, (parts, ids, out, count), last, config_last)
    return out
