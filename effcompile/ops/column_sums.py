"""Sum attention probabilities over queries, from scores and their LSE: what token selectors and evictions rank keys by.

`a_j = sum_i exp(scale * q_i . k_j - LSE_i)` over some rows i. The probabilities of a block of rows exist only while they are
summed. SpAtten (arXiv:2012.09852), H2O (arXiv:2306.14048), SnapKV (arXiv:2404.14469) and ZipVL (arXiv:2410.08584) differ in the
rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from effcompile.core.expr_eval import evaluate, from_json
from effcompile.ops.block_grid import grouped

_ROWS = 256  # rows of scores that exist at a time


def column_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor | None,
    rows: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    scale: float,
) -> torch.Tensor:
    """Return the probability that `rows` of queries give to each key, summed over them: `[B, Hq, K]`.

    q `[B, Hq, Q, D]`, k `[B, Hkv, K, D]`; rows `[R]` int64 are places among the Q queries, and the predicate `keep` holds for
    them as for any row. `lse` `[B, Hq, Q]` comes from the kernel that ran the attention; None computes that of the rows alone.
    A row without keys adds nothing. The result is float32, float64 for float64.
    """
    batch, heads, _, _ = q.shape
    columns = k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(wide)
    total = torch.zeros((batch, heads, columns), dtype=wide, device=q.device)
    for part in rows.split(_ROWS):
        scores = grouped(q[:, :, part].to(wide), keys) * scale
        scores = scores.masked_fill(~kept_rows(keep, (batch, heads, columns), part, loads, sizes), -math.inf)
        mine = scores.logsumexp(-1) if lse is None else lse[:, :, part].to(wide)
        mine = torch.where(mine == -math.inf, 0.0, mine)
        total += (scores - mine[..., None]).exp().sum(2)
    return total


def kept_rows(
    keep: str, extents: tuple[int, int, int], rows: torch.Tensor, loads: Sequence[torch.Tensor], sizes: Sequence[int]
) -> torch.Tensor:
    """Return which keys some rows `[R]` or `[B, R]` keep, `[B, H, R, K]`, for extents (B, H, K)."""
    batch, heads, columns = extents
    device = rows.device
    axes = (
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(heads, device=device)[None, :, None, None],
        rows.reshape(-1, 1, rows.shape[-1], 1),
        torch.arange(columns, device=device)[None, None, None, :],
    )
    return evaluate(from_json(keep), axes, loads, sizes).expand(batch, heads, rows.shape[-1], columns)
