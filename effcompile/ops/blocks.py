"""Define the CPU kernels that are compositions of torch's flash attention, and the block map that FlexAttention reads.

`eff::attention_padded_v2` runs each sequence of a padded batch on its own real keys. `eff::attention_blocked_v2` runs each block of
queries on the key range that its predicate can keep, with a mask tile only where the range is partial. Neither ever holds a
Q x K tensor. Both are opaque to TorchInductor on purpose: their control flow depends on data. Sink logits scale the rows of each
part by its LSE (`sinks.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from effcompile.core.expr import BATCH, HEAD, Expr, axes_of
from effcompile.core.expr_eval import evaluate, from_json
from effcompile.core.intervals import block_bounds
from effcompile.ops.attention import define
from effcompile.ops.sinks import empty_gate, flash_cpu, gate

Q_BLOCK = 256
K_BLOCK = 64


def attention_padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    kept: torch.Tensor,
    causal: bool,
    empty_row: str,
    scale: float,
) -> torch.Tensor:
    """Compute attention over a padded batch.

    q `[B, Hq, Q, D]`, k `[B, Hkv, K, D]`, v `[B, Hkv, K, Dv]`, sinks `[Hq]`, kept `[B|1, K]` bool (True keeps the key). With
    `causal` (Q == K) query i reads kept keys j <= i. An empty row gives 0, or the mean of V where `empty_row` is "uniform", of
    which a sink leaves nothing. Returns `[B, Hq, Q, Dv]`.
    """
    batch, heads, rows, _ = q.shape
    out = q.new_empty((batch, heads, rows, v.shape[3]))
    spans = _spans(kept.expand(batch, kept.shape[-1]))
    if len(set(spans)) == 1 and (spans[0][2] or kept.shape[0] == 1):
        _padded_slice(out, q, k, v, sinks, kept[:1], spans[0], causal, empty_row, scale)
        return out
    for number, span in enumerate(spans):
        one = slice(number, number + 1)
        mine = kept[one] if kept.shape[0] > 1 else kept
        _padded_slice(out[one], q[one], k[one], v[one], sinks, mine, span, causal, empty_row, scale)
    return out


def _spans(kept: torch.Tensor) -> list[tuple[int, int, bool]]:
    """Return for each row the first kept key, one past the last, and whether the keys between are all kept."""
    length = kept.shape[-1]
    first = kept.int().argmax(-1)
    last = length - kept.flip(-1).int().argmax(-1)
    count = kept.sum(-1)
    return [
        (0, 0, True) if n == 0 else (a, b, b - a == n) for a, b, n in zip(first.tolist(), last.tolist(), count.tolist())
    ]


def _padded_slice(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    kept: torch.Tensor,
    span: tuple[int, int, bool],
    causal: bool,
    empty_row: str,
    scale: float,
) -> None:
    begin, end, solid = span
    rows, group = q.shape[2], q.shape[1] // k.shape[1]
    first = begin if causal else 0
    if begin == end:
        first = rows
    if first:
        out[:, :, :first] = empty_rows(v, group, empty_row, sinks)
    if begin == end:
        return
    keys, values = k[:, :, begin:end], v[:, :, begin:end]
    if not solid:
        mask = kept[:, None, None, begin:end]
        if causal:
            places = torch.arange(begin, end, device=q.device)
            mask = mask & (places[None, :] <= torch.arange(first, rows, device=q.device)[:, None])
        out[:, :, first:] = flash(q[:, :, first:], keys, values, mask, False, scale, sinks)
    elif causal:
        out[:, :, first:end] = flash(q[:, :, first:end], keys, values, None, True, scale, sinks)
        if end < rows:
            out[:, :, end:] = flash(q[:, :, end:], keys, values, None, False, scale, sinks)
    else:
        out[:] = flash(q, keys, values, None, False, scale, sinks)


def flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return torch's attention over keys that are all read, or those that `mask` keeps, scaled where there are sinks."""
    if sinks is not None:
        out, lse = flash_cpu(q, k, v, mask, causal, scale)
        return out.mul_(gate(lse, sinks))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def empty_rows(v: torch.Tensor, group: int, rule: str, sinks: torch.Tensor | None) -> torch.Tensor:
    """Return what a row without keys gives: `[B, Hq, 1, Dv]`."""
    if rule == "uniform":
        row = v.mean(2, keepdim=True, dtype=torch.float32).to(v.dtype).repeat_interleave(group, 1)
    else:
        row = v.new_zeros((v.shape[0], v.shape[1] * group, 1, v.shape[3]))
    return row if sinks is None else (row * empty_gate(sinks, rule, v)).to(v.dtype)


def attention_blocked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    empty_row: str,
    scale: float,
) -> torch.Tensor:
    """Compute attention under the predicate `keep`, one block of queries at a time.

    Shapes as in `attention_padded`. The key range of a block comes from interval arithmetic on the predicate.
    """
    predicate = from_json(keep)
    batch, heads, rows, _ = q.shape
    columns = k.shape[2]
    out = q.new_empty((batch, heads, rows, v.shape[3]))
    every, some = block_bounds(predicate, (batch, heads, rows, columns), (Q_BLOCK, K_BLOCK), loads, sizes, q.device)
    every, some = every.all(1), some.any(1)  # heads share a range; the tile still tells them apart
    split = every.shape[0] > 1
    for number in range(every.shape[0]):
        part = slice(number, number + 1) if split else slice(None)
        ranges = _ranges(every[number], some[number], columns)
        for block, (begin, end, whole) in enumerate(ranges):
            lines = slice(block * Q_BLOCK, min(rows, (block + 1) * Q_BLOCK))
            tile = None if whole else _tile(predicate, part, lines, (begin, end), q, loads, sizes)
            mine = out[part, :, lines]
            if begin == end:
                mine[:] = empty_rows(v[part], heads // k.shape[1], empty_row, sinks)
                continue
            mine[:] = flash(q[part, :, lines], k[part, :, begin:end], v[part, :, begin:end], tile, False, scale, sinks)
            if tile is not None and empty_row in ("uniform", "nan"):
                gone = ~tile.any(-1, keepdim=True)
                if bool(gone.any()):
                    mine[:] = torch.where(gone, empty_rows(v[part], heads // k.shape[1], empty_row, sinks), mine)
    return out


def _ranges(every: torch.Tensor, some: torch.Tensor, columns: int) -> list[tuple[int, int, bool]]:
    """Return (first key, one past the last, all kept) for each block of queries."""
    found = []
    count = some.shape[-1]
    for line_every, line_some in zip(every.tolist(), some.tolist()):
        if not any(line_some):
            found.append((0, 0, True))
            continue
        first = line_some.index(True)
        last = count - line_some[::-1].index(True)
        found.append((first * K_BLOCK, min(columns, last * K_BLOCK), all(line_every[first:last])))
    return found


def _tile(
    predicate: Expr,
    part: slice,
    lines: slice,
    columns: tuple[int, int],
    q: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
) -> torch.Tensor:
    used = axes_of(predicate)
    device = q.device
    rows = torch.arange(q.shape[0], device=device)[part] if BATCH in used else torch.zeros(1, dtype=torch.int64)
    heads = torch.arange(q.shape[1], device=device) if HEAD in used else torch.zeros(1, dtype=torch.int64)
    axes = (
        rows[:, None, None, None],
        heads[None, :, None, None],
        torch.arange(lines.start, lines.stop, device=device)[None, None, :, None],
        torch.arange(*columns, device=device)[None, None, None, :],
    )
    value = evaluate(predicate, axes, loads, sizes)
    return value.expand(*value.shape[:2], lines.stop - lines.start, columns[1] - columns[0])


def block_map(
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    batch: int,
    heads: int,
    rows: int,
    columns: int,
    block: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return FlexAttention's block lists for a predicate.

    `(kv_num_blocks [B', H', Qb], kv_indices [B', H', Qb, Kb], full_kv_num_blocks, full_kv_indices)`, int32; B' and H' are 1 where
    the predicate does not depend on them. Full blocks need no element mask.
    """
    predicate = from_json(keep)
    used = axes_of(predicate)
    extents = (batch if BATCH in used else 1, heads if HEAD in used else 1, rows, columns)
    every, some = block_bounds(predicate, extents, (block, block), loads, sizes, device)
    partial = some & ~every
    return (*listed(partial), *listed(every))


def listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (counts `[..., Qb]`, indices `[..., Qb, Kb]`) of a map, int32: chosen blocks first and in order."""
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return chosen.sum(-1).to(torch.int32), order.contiguous()


def _fake_map(
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    batch: int,
    heads: int,
    rows: int,
    columns: int,
    block: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    used = axes_of(from_json(keep))
    lead = (batch if BATCH in used else 1, heads if HEAD in used else 1, (rows + block - 1) // block)
    count = torch.empty(lead, dtype=torch.int32, device=device)
    index = torch.empty((*lead, (columns + block - 1) // block), dtype=torch.int32, device=device)
    return count, index, count.clone(), index.clone()


def _fake_padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object) -> torch.Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def register() -> None:
    """Register the three ops, once."""
    define(
        "eff::attention_padded_v2",
        "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor kept, bool causal, str empty_row, float scale) -> Tensor",
        attention_padded,
        _fake_padded,
    )
    define(
        "eff::attention_blocked_v2",
        "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor[] loads, SymInt[] sizes, str keep, str empty_row, float scale) "
        "-> Tensor",
        attention_blocked,
        _fake_padded,
    )
    define(
        "eff::block_map_v1",
        "(Tensor[] loads, SymInt[] sizes, str keep, SymInt batch, SymInt heads, SymInt rows, SymInt columns, int block, "
        "Device device) -> (Tensor, Tensor, Tensor, Tensor)",
        block_map,
        _fake_map,
    )
