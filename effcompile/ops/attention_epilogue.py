"""Define `eff::attention_epilogue_v1`: attention over a block map with its LSE, whose result is scaled by rows and added to.

`O * row_scale + addend` replays a cached residual without another pass over the result (Re-ttention, arXiv:2505.22918), and scales
partial results when they are merged by their LSE. On CPU the C++ kernel does it before it rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from effcompile.core.expr_eval import from_json
from effcompile.ops import native
from effcompile.ops.attention import define
from effcompile.ops.attention_blocks import compiled, gathered, kept_pairs, revive

NAME = "eff::attention_epilogue_v1"
Pair = tuple[torch.Tensor, torch.Tensor]
Attend = Callable[..., Pair]
_ROWS = 64  # rows of scores that exist at a time


def attention_epilogue(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: torch.Tensor,
    row_scale: torch.Tensor | None,
    addend: torch.Tensor | None,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    empty_row: str,
    scale: float,
    q_block: int,
    k_block: int,
    order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (O * row_scale + addend `[B, Hq, Q, Dv]`, LSE `[B, Hq, Q]` float32 of the scores that O is made of).

    Operands as in `eff::attention_blocks_v1`; row_scale `[B, Hq, Q]` float32 and addend `[B, Hq, Q, Dv]` of q's dtype may each be
    None. A row that the map would empty reads all that the predicate keeps; one that the predicate empties has O by its rule and an
    LSE of -inf. Where Q = K, `order` int64 `[N]` may say which token stands at each place that map and predicate speak of; operands
    and results stay in the order of tokens.
    """
    if order is not None:
        if native.runs(native.BLOCKS, q, k, v):
            orders = (order[None, None], order[None, None])
            rest = (loads, sizes, keep, scale, q_block, k_block)
            out, lse = compiled(q, k, v, chosen, *rest, None, row_scale, addend, orders)
            if not bool((lse == -math.inf).any()) or _settled(chosen, empty_row):
                return out, lse
        operands, more = (q, k, v, chosen, row_scale, addend), (loads, sizes, keep, empty_row, scale, q_block, k_block)
        return copied(attention_epilogue, operands, more, order)
    arguments = (q, k, v, chosen, loads, sizes, keep, scale, q_block, k_block)
    if native.runs(native.BLOCKS, q, k, v):
        out, lse = compiled(*arguments, row_scale=row_scale, addend=addend)
    else:
        out, lse = gathered(*arguments)
        out = _finished(out, row_scale, addend)
    dead = lse == -math.inf
    if bool(dead.any()) and not _settled(chosen, empty_row):
        plain = torch.zeros_like(out)
        revive(plain, dead, q, k, v, loads, sizes, keep, empty_row, scale)
        out = torch.where(dead[..., None], _finished(plain, row_scale, addend), out)
        lse = torch.where(dead, _lse_of(dead, q, k, loads, sizes, keep, scale), lse)
    return out, lse


def _settled(chosen: torch.Tensor, empty_row: str) -> bool:
    """Tell whether rows without keys are what they should be: 0, where no map emptied them and their rule is 0."""
    return empty_row == "zero" and bool(chosen.all())


def copied(attend: Attend, operands: Sequence[Any], rest: Sequence[Any], order: torch.Tensor) -> Pair:
    """Copy q, k, v, row_scale and addend into an order, attend, and copy the results back; the map is the fourth operand."""
    q, k, v, chosen, row_scale, addend = operands
    placed = [None if x is None else x.index_select(2, order) for x in (q, k, v, row_scale, addend)]
    out, lse = attend(*placed[:3], chosen, *placed[3:], *rest)
    back = order.argsort()
    return out.index_select(2, back), lse.index_select(2, back)


def _finished(out: torch.Tensor, row_scale: torch.Tensor | None, addend: torch.Tensor | None) -> torch.Tensor:
    wide = out if out.dtype == torch.float64 else out.float()
    wide = wide if row_scale is None else wide * row_scale[..., None]
    return (wide if addend is None else wide + addend).to(out.dtype)


def _lse_of(
    dead: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    loads: Sequence[torch.Tensor],
    sizes: Sequence[int],
    keep: str,
    scale: float,
) -> torch.Tensor:
    """Return the LSE under the predicate alone of dead rows `[B, Hq, Q]`; other rows are not computed."""
    predicate, group = from_json(keep), q.shape[1] // k.shape[1]
    keys = torch.arange(k.shape[2], device=q.device)[None, None, None, :]
    found = torch.full(dead.shape, -math.inf, dtype=torch.float32, device=q.device)
    for number in range(q.shape[0]):
        for part in dead[number].any(0).nonzero().squeeze(1).split(_ROWS):
            kept = kept_pairs(predicate, number, part, keys, q.shape[1], loads, sizes)
            wide = k[number : number + 1].repeat_interleave(group, 1)
            scores = torch.matmul(q[number : number + 1, :, part].float(), wide.float().transpose(-1, -2)) * scale
            found[number, :, part] = scores.masked_fill(~kept, -math.inf).logsumexp(-1)[0]
    return found


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


def register() -> None:
    """Register the op, once."""
    define(
        NAME,
        "(Tensor q, Tensor k, Tensor v, Tensor chosen, Tensor? row_scale, Tensor? addend, Tensor[] loads, SymInt[] sizes, "
        "str keep, str empty_row, float scale, int q_block, int k_block, Tensor? order=None) -> (Tensor, Tensor)",
        attention_epilogue,
        _fake,
    )
