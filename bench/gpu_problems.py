"""Set up the rows of the case gpu-attention: operands, sampled exact rows, and the arms that run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench import gpu_arms
from bench.exact import Sample, banded, sample
from bench.gpu_arms import Arm, Operands
from effcompile.ops import block_sparse

BLOCK = 128
PAGE = 16
COMPILED = (8192, 32768)
"""Lengths at which FlexAttention, which compiles for each, and the other configs of our kernels are measured."""


@dataclass(frozen=True)
class Layer:
    """Hold the sizes of an attention layer, and where it runs."""

    heads: int
    kv_heads: int
    head_dim: int
    device: str


@dataclass(frozen=True)
class Problem:
    """Hold one row: operands in sets, arms, the other configs of our kernel, and the FLOP of one call."""

    sets: list[Operands]
    arms: dict[str, Arm]
    others: dict[str, Arm] = field(default_factory=dict)
    flops: float = 0.0
    told: dict[str, Any] = field(default_factory=dict)


def operands(layer: Layer, batch: int, rows: int, keys: int, dims: tuple[int, int]) -> list[Operands]:
    """Return sets of q `[B, Hq, rows, D]`, k `[B, Hkv, keys, D]`, v `[B, Hkv, keys, Dv]`."""

    def make(seed: int) -> Operands:
        draw = torch.Generator(layer.device).manual_seed(seed)
        shapes = ((layer.heads, rows, dims[0]), (layer.kv_heads, keys, dims[0]), (layer.kv_heads, keys, dims[1]))
        options: dict[str, Any] = {"device": layer.device, "generator": draw, "dtype": torch.bfloat16}
        return tuple(torch.randn((batch, *shape), **options) for shape in shapes)

    return gpu_arms.operand_sets(make)


def dense(layer: Layer, length: int) -> Problem:
    """Return causal attention over all keys."""
    from effcompile.codegen.triton import flash

    width = layer.head_dim
    dims, scale = (width, 128 if width == 192 else width), width**-0.5
    sets = operands(layer, 1, length, length, dims)
    exact = sample(*sets[0], banded(length, length, 0), scale)
    args = (None, None, -1, 0, 0, scale, 0.0)
    arms = {
        "cudnn": gpu_arms.sdpa("CUDNN_ATTENTION", exact, is_causal=True, scale=scale),
        "flash": gpu_arms.sdpa("FLASH_ATTENTION", exact, is_causal=True, scale=scale),
        "flex": Arm(None, reason="measured at 8k and 32k and 128 dimensions only: it compiles for each"),
        "eff": gpu_arms.ours(lambda q, k, v: torch.ops.eff.flash_v1(q, k, v, *args), exact),
    }
    others = {}
    if length in COMPILED:
        arch = flash.launch.architecture_of(sets[0][0])
        for config in flash.configs(flash.form("bf16", arch, *dims, right=True), arch)[1:]:
            run = _configured(flash.attend, args, config)
            others[config.name] = gpu_arms.ours(run, exact)
        if width == 128:
            arms["flex"] = gpu_arms.flex(causal_lists(length, 1.0, 1, layer.device), BLOCK, length, scale, exact)
    return Problem(sets, arms, others, 2.0 * layer.heads * length * length * sum(dims) / 2)


def sparse(layer: Layer, length: int, wanted: float) -> Problem:
    """Return attention over random blocks of a causal mask."""
    from effcompile.codegen.triton import block_sparse as kernel

    width, scale = layer.head_dim, layer.head_dim**-0.5
    sets = operands(layer, 1, length, length, (width, width))
    partial, full = causal_map(-(-length // BLOCK), wanted, layer.heads, layer.device)
    density = density_of(partial, full)
    lists = (*block_sparse.lists(partial), *block_sparse.lists(full))
    exact = sample(*sets[0], map_keep(partial, full, BLOCK, length), scale)
    args = (*lists, *(None,) * 7, -1, 0, 0, BLOCK, BLOCK, scale, 0.0)
    arms = {
        "flex": Arm(None, reason="measured at 8k and 32k only: it compiles for each"),
        "eff": gpu_arms.ours(lambda q, k, v: torch.ops.eff.block_sparse_v1(q, k, v, *args), exact),
    }
    others = {}
    if length in COMPILED:
        arms["flex"] = gpu_arms.flex(lists, BLOCK, length, scale, exact)
        arch = kernel.launch.architecture_of(sets[0][0])
        for config in kernel.configs(kernel.form("bf16", arch, width, width, right=True), arch)[1:]:
            others[config.name] = gpu_arms.ours(_configured(kernel.attend, args, config), exact)
    flops = 2.0 * layer.heads * length * length * width * density
    return Problem(sets, arms, others, flops, {"density": round(density, 4)})


def _configured(attend: Callable[..., Any], args: tuple[Any, ...], config: Any) -> Callable[..., Any]:
    return lambda q, k, v: attend(q, k, v, *args, config=config)


def decode(layer: Layer, length: int, budget: int, sequences: int) -> Problem:
    """Return one new token per sequence over random pages of a budget, and over the whole cache beside it; whole pages only."""
    length -= length % PAGE
    width, scale = layer.head_dim, layer.head_dim**-0.5
    sets = operands(layer, sequences, 1, length, (width, width))[:2]
    lengths = torch.full((sequences,), length, dtype=torch.int32, device=layer.device)
    draw = torch.Generator(layer.device).manual_seed(1)
    count = length // PAGE
    order = torch.rand((sequences, layer.kv_heads, count), device=layer.device, generator=draw).argsort(-1)
    pages = order[..., : budget // PAGE].to(torch.int32).contiguous()
    chosen = torch.zeros(order.shape, dtype=torch.bool, device=layer.device).scatter(-1, pages.long(), True)

    def keep(b: Tensor, h: Tensor, i: Tensor) -> Tensor:
        return chosen[b, h // (layer.heads // layer.kv_heads)].repeat_interleave(PAGE, 1)

    def run(kept: Tensor | None) -> Callable[..., Any]:
        def paged(q: Tensor, k: Tensor, v: Tensor) -> Any:
            cache = (x.unflatten(2, (count, PAGE)) for x in (k, v))
            return torch.ops.eff.paged_decode_v1(q, *cache, lengths, None, kept, None, scale, 0.0, 0)

        return paged

    some, whole = sample(*sets[0], keep, scale), sample(*sets[0], banded(1, length, -1), scale)
    arms = {
        "cudnn": gpu_arms.sdpa("CUDNN_ATTENTION", whole, scale=scale),
        "flash": gpu_arms.sdpa("FLASH_ATTENTION", whole, scale=scale),
        "eff-every-page": gpu_arms.ours(run(None), whole),
        "eff": gpu_arms.ours(run(pages), some),
    }
    return Problem(sets, arms)


def scores(layer: Layer, length: int) -> Problem:
    """Return the estimators, with our dense attention beside them."""
    attention = dense(layer, length)
    scale = layer.head_dim**-0.5
    found = {name: gpu_arms.estimator(run, attention.sets[0]) for name, run in estimators(scale).items()}
    return Problem(attention.sets, {"eff": attention.arms["eff"], **found})


def estimators(scale: float) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return every estimator as a function of q and k of one length, under causal order."""
    eff = torch.ops.eff
    plain = (None, None)

    def probe(q: Tensor, k: Tensor) -> Tensor:
        rows = min(64, q.shape[2])
        sums: Tensor = eff.probe_scores_v1(q[:, :, -rows:], k, *plain, -1, 0, k.shape[2] - rows, scale, 0.0)[0]
        return sums

    def columns(q: Tensor, k: Tensor) -> Tensor:
        # Any LSE costs the same; this one keeps the weights in range.
        lse = torch.full(q.shape[:3], 12.0, device=q.device, dtype=torch.float64 if q.dtype == torch.float64 else None)
        sums: Tensor = eff.column_sums_v1(q, k, lse, *plain, -1, 0, 0, scale, 0.0)
        return sums

    return {
        "eff-pooled": lambda q, k: eff.pooled_scores_v1(q, k, *plain, -1, 0, 0, BLOCK, BLOCK, scale),
        "eff-antidiagonal-8": lambda q, k: eff.antidiagonal_mass_v1(q, k, *plain, 0, 0, BLOCK, BLOCK, 8, scale),
        "eff-antidiagonal-16": lambda q, k: eff.antidiagonal_mass_v1(q, k, *plain, 0, 0, BLOCK, BLOCK, 16, scale),
        "eff-probe": probe,
        "eff-column-sums": columns,
    }


def int8(layer: Layer, length: int) -> Problem:
    """Return int8 products beside dense arms; their error may be that of 8 bits."""
    problem = dense(layer, length)
    scale, v = layer.head_dim**-0.5, problem.sets[0][2]
    args = (None, None, -1, 0, 0, scale)
    exact = sample(*problem.sets[0], banded(length, length, 0), scale)
    loose: Sample = replace(exact, floor=0.02 * float(v.abs().max()))
    mine = gpu_arms.ours(lambda q, k, v: torch.ops.eff.int8_attention_v1(q, k, v, *args), loose)
    arms = {"cudnn": problem.arms["cudnn"], "eff": problem.arms["eff"], "eff-int8": mine}
    return Problem(problem.sets, arms, {}, problem.flops)


def causal_map(blocks: int, density: float, heads: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random maps of (partial, full) blocks under causal order, bool `[1, heads, blocks, blocks]`.

    The diagonal is partial and always there, block 0 is kept, and the rest is drawn so that `density` of the allowed
    blocks are kept; below what diagonal and first column take, they alone are left.
    """
    rows = torch.arange(blocks)
    below = rows[None, :] < rows[:, None]
    first = below & (rows[None, :] == 0)
    wanted = max(0, round(density * blocks * (blocks + 1) / 2) - blocks - int(first.sum()))
    places = (below & ~first).flatten().nonzero().squeeze(1)
    draw = torch.Generator().manual_seed(seed)
    full = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    for head in range(heads):
        full[head] = first
        full[head].view(-1)[places[torch.randperm(len(places), generator=draw)[:wanted]]] = True
    partial = torch.eye(blocks, dtype=torch.bool).expand(heads, blocks, blocks)
    return partial[None].contiguous().to(device), full[None].to(device)


def causal_lists(length: int, density: float, heads: int, device: str) -> tuple[Tensor, ...]:
    """Return the lists (partial, full) of a causal map."""
    partial, full = causal_map(-(-length // BLOCK), density, heads, device)
    return (*block_sparse.lists(partial), *block_sparse.lists(full))


def density_of(partial: Tensor, full: Tensor) -> float:
    """Return kept blocks over allowed blocks of causal maps."""
    blocks = full.shape[-1]
    return float((partial | full).sum()) / full.shape[1] / (blocks * (blocks + 1) / 2)


def map_keep(partial: Tensor, full: Tensor, block: int, keys: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the `keep` of `exact.sample` for causal maps."""

    def keep(b: Tensor, h: Tensor, i: Tensor) -> Tensor:
        columns = torch.arange(keys, device=i.device)
        some = partial[0, h, i // block].repeat_interleave(block, 1)[:, :keys] & (columns <= i[:, None])
        return some | full[0, h, i // block].repeat_interleave(block, 1)[:, :keys]

    return keep
