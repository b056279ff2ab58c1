"""Define `eff::attention_tokens_v1`: attention among the tokens that matter (ZipVL, arXiv:2410.08584, first version).

A few probe rows show how much attention each token gets. The tokens that hold a share of it attend to each other under the model's
own predicate; the others get 0, so that only the residual stream carries them on. How many they are is the layer's own. The last
rows are among the probes: the choice sees the whole prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effcompile.core.expr import BATCH, BOOL, INT, KEY, QUERY, Expr, apply, axis, const, load
from effcompile.core.expr_eval import from_json, to_json
from effcompile.core.mask import causal_offset, substitute
from effcompile.ops.attention import define
from effcompile.ops.attention_blocks import attention_blocks
from effcompile.ops.block_grid import BlockGrid
from effcompile.ops.probes import probe
from effcompile.ops.ragged import gather_plan, gather_rows, scatter_rows

NAME = "eff::attention_tokens_v1"
BLOCK = 128  # of queries and keys among gathered tokens, and what their number is rounded up to
_B, _Q, _K = axis(BATCH), axis(QUERY), axis(KEY)


def attention_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    empty_row: str,
    scale: float,
    mass: float,
    recent: int,
    spread: int,
    least: float,
) -> torch.Tensor:
    """Compute attention among the kept tokens of q `[B, Hq, N, D]`, k `[B, Hkv, N, D]`, v `[B, Hkv, N, Dv]`; the others get 0.

    `mass` 1 keeps all. Returns `[B, Hq, N, Dv]`.
    """
    length = q.shape[2]
    if mass >= 1:
        blocks = -(-length // BLOCK)
        whole = torch.ones((1, 1, blocks, blocks), dtype=torch.bool, device=q.device)
        return attention_blocks(q, k, v, whole, loads, sizes, keep, empty_row, scale, BLOCK, BLOCK)
    index, used = gather_plan(kept_tokens(q, k, loads, sizes, keep, scale, mass, recent, spread, least), BLOCK)
    inner = to_json(_among(from_json(keep), len(loads)))
    blocks = -(-index.shape[1] // BLOCK)
    whole = torch.ones((1, 1, blocks, blocks), dtype=torch.bool, device=q.device)
    few = (gather_rows(q, index), gather_rows(k, index), gather_rows(v, index))
    out = attention_blocks(*few, whole, [*loads, index, used], sizes, inner, "zero", scale, BLOCK, BLOCK)
    return scatter_rows(out, index, used, length).contiguous()


def _among(keep: Expr, slot: int) -> Expr:
    """Return a predicate over gathered tokens: `slot` holds their places, the next one which of them are real."""
    parts = []
    for part in keep.args if keep.op == "and" else (keep,):
        if causal_offset(part) == const(0):
            parts.append(part)  # gathered tokens keep their order
            continue
        moved = substitute(part, _Q, load(slot, (_B, _Q), INT))
        parts.append(substitute(moved, _K, load(slot, (_B, _K), INT)))
    real = [load(slot + 1, (_B, of), BOOL) for of in (_K, _Q)]
    return apply("and", *parts, *real)


def kept_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    scale: float,
    mass: float,
    recent: int,
    spread: int,
    least: float,
) -> torch.Tensor:
    """Return which tokens of each sequence to keep, `[B, N]`.

    Their number is the fewest tokens that hold `mass` of the probe rows' attention, averaged over heads, and at least `least` of
    the real ones. Which they are is decided by that attention over the number of probe rows that see the token, so that early
    tokens gain nothing from being seen more often. The first and the last real token stay.
    """
    batch, heads, length, _ = q.shape
    grid = BlockGrid.of((batch, heads, length, length), (BLOCK, BLOCK), keep, loads, sizes, q.device)
    real = grid.real_rows
    real = torch.ones((batch, length), dtype=torch.bool, device=q.device) if real is None else real.expand(batch, -1)
    rows, valid = probes(real, recent, spread)
    read = probe(q, k, rows, valid, grid, scale)
    raw = read.columns.mean(1)
    fair = raw / read.seen.clamp(min=1)
    held = raw.sort(-1, descending=True).values.cumsum(-1)
    count = (held < mass * held[:, -1:]).sum(-1, keepdim=True) + 1
    count = torch.maximum(count, (least * real.sum(-1, keepdim=True)).ceil().long())
    order = fair.masked_fill(~real, -1.0).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(length, device=q.device)
    chosen = torch.zeros_like(real).scatter(1, order, places < count)
    first = real.int().argmax(-1, keepdim=True)
    last = length - 1 - real.flip(-1).int().argmax(-1, keepdim=True)
    return (chosen | (places == first) | (places == last)) & real


def probes(real: torch.Tensor, recent: int, spread: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rows `[B, R]`, valid `[B, R]`): the last real rows, and others by a fixed random order."""
    length = real.shape[1]
    places = torch.arange(length, device=real.device)
    late = torch.where(real, places, -1).topk(min(recent, length), -1).values
    taken = real.new_zeros((real.shape[0], length + 1)).scatter(1, late.masked_fill(late < 0, length), True)[:, :length]
    random = torch.randperm(length, generator=torch.Generator().manual_seed(0)).to(real.device)
    other = torch.where(real & ~taken, random, -1).topk(min(spread, length), -1)
    rows = torch.cat([late.clamp(min=0), other.indices], -1)
    return rows, torch.cat([late >= 0, other.values >= 0], -1)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object) -> torch.Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def register() -> None:
    """Register the op, once."""
    define(
        NAME,
        "(Tensor q, Tensor k, Tensor v, Tensor[] loads, SymInt[] sizes, str keep, str empty_row, float scale, float mass, "
        "int recent, int spread, float least) -> Tensor",
        attention_tokens,
        _fake,
    )
