"""Define `eff::attention_blocks_v1`: attention over a block map that is known at run time only.

A map is bool `[B|1, H', Qb, Kb]`, H' dividing the query heads, and says which blocks of queries and keys are computed. It
narrows the predicate, never widens it: what is computed is `map & keep`. A row for which that leaves nothing although the
predicate keeps a key gets all that the predicate keeps, so that no map can empty a row; a row that the predicate itself empties
follows its own rule.

On CPU the op runs `cpp/attention_blocks.cpp`, or a composition of torch operations where there is no compiler (`gathered`). The op
is opaque to TorchInductor: its control flow depends on data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from effcompile.core.expr import BATCH, HEAD, TRUE, Expr, axes_of
from effcompile.core.expr_eval import evaluate, from_json
from effcompile.core.intervals import block_bounds
from effcompile.ops import native
from effcompile.ops.attention import define
from effcompile.ops.block_grid import BlockGrid, tiles_of
from effcompile.ops.blocks import listed
from effcompile.ops.native_pages import attend_pages
from effcompile.ops.row_limits import split_limits, values

Extents = tuple[int, int, int, int]
_CHUNK = 64  # dead rows, or pairs of a head and a query block, that are computed at a time


def attention_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    empty_row: str,
    scale: float,
    q_block: int,
    k_block: int,
) -> torch.Tensor:
    """Compute attention over the chosen blocks.

    q `[B, Hq, Q, D]`, k `[B, Hkv, K, D]`, v `[B, Hkv, K, Dv]`, chosen `[B|1, H', Qb, Kb]` bool with Qb = ceil(Q / q_block)
    and Kb = ceil(K / k_block). An empty row gives 0, or the mean of V where `empty_row` is "uniform". Returns
    `[B, Hq, Q, Dv]`.
    """
    if q.shape[2] == 1 and native.runs(native.PAGES, q, k, v) and split_limits(keep).rest == TRUE:
        out, lse = one_query(q, k, v, chosen, loads, sizes, keep, scale, k_block)
    elif native.runs(native.BLOCKS, q, k, v):
        out, lse = compiled(q, k, v, chosen, loads, sizes, keep, scale, q_block, k_block)
    else:
        out, lse = gathered(q, k, v, chosen, loads, sizes, keep, scale, q_block, k_block)
    dead = lse == -math.inf
    if bool(dead.any()):
        revive(out, dead, q, k, v, loads, sizes, keep, empty_row, scale)
    return out


def bounds(
    keep: str,
    extents: Extents,
    blocks: tuple[int, int],
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (every, some) of a predicate per block, `[B|1, H|1, Qb, Kb]`; 1 where it does not depend on the axis."""
    predicate = from_json(keep)
    used = axes_of(predicate)
    lead = (extents[0] if BATCH in used else 1, extents[1] if HEAD in used else 1)
    return block_bounds(predicate, (*lead, *extents[2:]), blocks, loads, sizes, device)


def within(chosen: torch.Tensor, some: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the map without blocks in which the predicate keeps nothing."""
    if some.shape[1] > 1 and chosen.shape[1] != heads:
        chosen = chosen.repeat_interleave(heads // chosen.shape[1], 1)
    return chosen & some


# --- C++ -----------------------------------------------------------------------------------------------------------------


def compiled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    scale: float,
    q_block: int,
    k_block: int,
    out: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    orders: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the C++ kernel; return the output and its LSE `[B, Hq, Q]` float32, -inf for a row without keys.

    The result goes into `out` `[B, Hq, Q, Dv]` where it is given, whose last dimension is dense. Its rows are multiplied by
    `row_scale` `[B, Hq, Q]` float32, then `addend` `[B, Hq, Q, Dv]` of q's dtype is added, before they are rounded. `orders` of
    queries and keys, `[B|1, H|1, Q]` and `[B|1, H|1, K]` with as many of each as of the other, say which token stands at each place
    that map and predicate speak of; what comes in and goes out stays in the order of tokens. An order by head needs Hq = Hkv.
    """
    q, k, v = (native.dense_rows(x) for x in (q, k, v))
    batch, heads, rows, depth = q.shape
    extents = (batch, heads, rows, k.shape[2])
    grid = BlockGrid.of(extents, (q_block, k_block), keep, loads, sizes, q.device)
    (every, some), limits, parts = grid.both, grid.limits, split_limits(keep)
    chosen = chosen.contiguous()
    tile_of, tiles = _tiles(grid, parts.rest, chosen)
    out = q.new_empty((batch, heads, rows, v.shape[3])) if out is None else out
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
    shape = [batch, heads, k.shape[1], rows, k.shape[2], depth, v.shape[3], q_block, k_block]
    shape += [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]]
    shape += [chosen.shape[0], chosen.shape[1], every.shape[0], every.shape[1]]
    first, last = limits.first, limits.last
    cuts = max((x.shape[0] for x in (first, last) if x is not None), default=1)
    first, last = (None if x is None else x.expand(cuts, rows).contiguous() for x in (first, last))
    shape += [cuts, 1 if limits.keys is None else limits.keys.shape[0]]
    shape += [1, 1] if tile_of is None else [tile_of.shape[0], tile_of.shape[1]]
    shape += [1, 1] if orders is None else orders[0].shape[:2]
    shape.append(torch.get_num_threads())
    operands = [q, k, v, out, lse, chosen, some, every, first, last, limits.keys, tile_of, tiles]
    operands += [None if x is None else x.contiguous() for x in (row_scale, addend)]
    operands += [None, None] if orders is None else [x.to(torch.int32).contiguous() for x in orders]
    native.call(native.BLOCKS, "eff_attention_blocks", q.dtype, shape, operands, scale)
    return out, lse


def one_query(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    scale: float,
    k_block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the C++ kernel for one query under a range and a set of keys, which copies no key; returns as `compiled` does."""
    limits = values(split_limits(keep), (*q.shape[:3], k.shape[2]), loads, sizes)
    return attend_pages(q, k, v, chosen, limits, scale, k_block)


def _tiles(grid: BlockGrid, rest: Expr, chosen: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return what `block_grid.tiles_of` gives for blocks that the predicate cuts: all of them from the grid, or those chosen."""
    if rest == TRUE:
        return None, None
    if grid.tiles is not None:
        return grid.tiles
    every, some = grid.both
    return tiles_of(grid, rest, within(chosen, some & ~every, grid.extents[1]))


# --- torch operations alone -----------------------------------------------------------------------------------------------


def gathered(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    scale: float,
    q_block: int,
    k_block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the kept keys of each block of queries and attend to them under the predicate; returns as `compiled` does."""
    predicate = from_json(keep)
    batch, heads, rows, _ = q.shape
    columns, group = k.shape[2], heads // k.shape[1]
    _, some = bounds(keep, (batch, heads, rows, columns), (q_block, k_block), loads, sizes, q.device)
    picked = within(chosen, some, heads)
    counts, lists = listed(picked)
    counts, lists = (x.repeat_interleave(heads // picked.shape[1], 1) for x in (counts, lists))
    counts, lists = counts.expand(batch, -1, -1), lists.expand(batch, -1, -1, -1)
    out = q.new_zeros((batch, heads, rows, v.shape[3]))
    lse = torch.full((batch, heads, rows), -math.inf, dtype=torch.float32, device=q.device)
    q_step, k_step = (torch.arange(n, device=q.device) for n in (q_block, k_block))
    order = counts.reshape(-1).argsort(stable=True)
    lines = counts.shape[2]
    for begin in range(0, len(order), _CHUNK):
        pair = order[begin : begin + _CHUNK]
        b, h, line = pair // (heads * lines), pair // lines % heads, pair % lines
        most = int(counts[b, h, line].max())
        if most == 0:
            continue
        columns_of = lists[b, h, line, :most].long()
        valid = torch.arange(most, device=q.device) < counts[b, h, line][:, None]
        keys = (columns_of[:, :, None] * k_block + k_step).flatten(1)
        valid = valid[:, :, None].expand(-1, -1, k_block).flatten(1) & (keys < columns)
        keys = keys.clamp(max=columns - 1)
        mine = line[:, None] * q_block + q_step
        inside, mine = mine < rows, mine.clamp(max=rows - 1)
        axes = (b[:, None, None], h[:, None, None], mine[:, :, None], keys[:, None, :])
        kept = evaluate(predicate, axes, loads, sizes).expand(len(pair), q_block, keys.shape[1]) & valid[:, None, :]
        one = (b[:, None], h[:, None], mine)
        keys_of = (b[:, None], h[:, None] // group, keys)
        scores = torch.matmul(q[one].to(_wide(q)), k[keys_of].to(_wide(q)).transpose(-1, -2)) * scale
        scores = scores.masked_fill(~kept, -math.inf)
        total = scores.logsumexp(-1)
        probs = torch.where(total[..., None] == -math.inf, 0.0, (scores - total[..., None]).exp())
        found = torch.matmul(probs.to(v.dtype), v[keys_of])
        b, h = (x[:, None].expand(-1, q_block)[inside] for x in (b, h))
        out[b, h, mine[inside]] = found[inside]
        lse[b, h, mine[inside]] = total[inside].float()
    return out, lse


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- rows that a map would empty ----------------------------------------------------------------------------------------------


def revive(
    out: torch.Tensor,
    dead: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    empty_row: str,
    scale: float,
) -> None:
    """Compute dead rows under the predicate alone, and give those that it empties what its rule says."""
    predicate, group = from_json(keep), q.shape[1] // k.shape[1]
    keys = torch.arange(k.shape[2], device=q.device)[None, None, None, :]
    for number in range(q.shape[0]):
        rows = dead[number].any(0).nonzero().squeeze(1)
        for part in rows.split(_CHUNK):
            kept = kept_pairs(predicate, number, part, keys, q.shape[1], loads, sizes)
            query = q[number : number + 1, :, part]
            key, value = (x[number : number + 1].repeat_interleave(group, 1) for x in (k, v))
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=kept, scale=scale)
            empty = ~kept.any(-1, keepdim=True)
            if empty_row == "uniform":
                mean = value.mean(2, keepdim=True, dtype=_wide(v)).to(v.dtype)
            else:
                mean = value.new_zeros(())
            found = torch.where(empty, mean, found)
            gone = dead[number, :, part][None, :, :, None]
            out[number : number + 1, :, part] = torch.where(gone, found, out[number : number + 1, :, part])


def kept_pairs(
    predicate: Expr,
    number: int,
    rows: torch.Tensor,
    keys: torch.Tensor,
    heads: int,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
) -> torch.Tensor:
    """Return which keys `rows` `[R]` of sequence `number` keep, `[1, H, R, K]`; keys `[1, 1, 1, K]` are places."""
    lead = torch.full((1, 1, 1, 1), number, device=rows.device)
    axes = (lead, torch.arange(heads, device=rows.device)[None, :, None, None], rows[None, None, :, None], keys)
    return evaluate(predicate, axes, loads, sizes).expand(1, heads, len(rows), keys.shape[-1])


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object) -> torch.Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def register() -> None:
    """Register the op, once."""
    define(
        "eff::attention_blocks_v1",
        "(Tensor q, Tensor k, Tensor v, Tensor chosen, Tensor[] loads, SymInt[] sizes, str keep, str empty_row, float scale, "
        "int q_block, int k_block) -> Tensor",
        attention_blocks,
        _fake,
    )
