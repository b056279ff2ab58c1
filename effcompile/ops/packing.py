"""Define the ops that drop padded rows: find the rows to keep, and attend over packed sequences.

A padded batch `[B, S, ...]` becomes its real rows `[N, ...]`, sequence after sequence; N is known only at run time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from effcompile.ops.attention import define


def pack_rows(kept: torch.Tensor, first: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (index `[N]` into the flattened `[B * S]` rows, is_key `[N]` bool, lengths `[B]` of rows per sequence).

    kept `[B, S]` bool. With `first`, row 0 of every sequence is kept as well, as a query only: a CLS head reads it.
    """
    rows = kept
    if first:
        rows = kept.clone()
        rows[:, 0] = True
    index = rows.flatten().nonzero().squeeze(1)
    return index, kept.flatten()[index], rows.sum(1)


def attention_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    is_key: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attend within each packed sequence.

    q `[N, Hq, D]`, k `[N, Hkv, D]`, v `[N, Hkv, Dv]`, lengths `[B]` summing to N. Rows with `is_key` False are read by nobody; a
    sequence without keys gives 0. Neighbors of equal length run as one batch. Returns `[N, Hq, Dv]`.
    """
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    every_key = bool(is_key.all())
    begin = 0
    for length, count in _runs(lengths.tolist(), every_key):
        end = begin + length * count
        span = slice(begin, end)
        begin = end
        if length == 0:
            continue
        query, key, value = (x[span].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        keys = is_key[span]
        if not every_key and not bool(keys.all()):
            chosen = keys.nonzero().squeeze(1)
            if chosen.numel() == 0:
                out[span] = 0
                continue
            key, value = key[:, :, chosen], value[:, :, chosen]
        grouped = q.shape[1] != k.shape[1]
        result = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)
        out[span] = result.transpose(1, 2).flatten(0, 1)
    return out


def _runs(lengths: list[int], joined: bool) -> list[tuple[int, int]]:
    """Return (length, how many neighbors have it)."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if joined and runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs


def _fake_rows(kept: torch.Tensor, first: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    index = kept.new_empty((count,), dtype=torch.int64)
    return index, kept.new_empty((count,)), kept.new_empty((kept.shape[0],), dtype=torch.int64)


def _fake_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object) -> torch.Tensor:
    return q.new_empty((*q.shape[:2], v.shape[2]))


def register() -> None:
    """Register both ops, once."""
    define("eff::pack_rows_v1", "(Tensor kept, bool first) -> (Tensor, Tensor, Tensor)", pack_rows, _fake_rows)
    define(
        "eff::attention_packed_v1",
        "(Tensor q, Tensor k, Tensor v, Tensor is_key, Tensor lengths, float scale) -> Tensor",
        attention_packed,
        _fake_packed,
    )
